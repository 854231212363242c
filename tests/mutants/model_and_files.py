"""Ways of breaking the network and the model file."""

from __future__ import annotations

from mutants.change import (
    ARCH,
    ATOMIC,
    ATTENTION,
    CHECKPOINT,
    FILES,
    INIT,
    MODEL_CONFIG,
    PLAIN_KERNELS,
    READER,
    STRUCTURE,
    TRAINER,
    Change,
)

MUTANTS: tuple[Change, ...] = (
    Change(INIT + "003", "the refusal loses its id", FILES, "falsifier=MISSING,", "falsifier=None,"),
    Change(
        INIT + "003",
        "a folder or pipe passes for a file",
        FILES,
        "    if stat.S_ISREG(mode):",
        "    if not stat.S_ISLNK(mode):",
    ),
    Change(
        INIT + "004",
        "every magic is right",
        STRUCTURE,
        "    if magic == MAGIC:\n        return",
        "    if magic != b'':\n        return",
        also=(CHECKPOINT + "001",),
    ),
    Change(
        INIT + "005",
        "a missing theta is not noticed",
        MODEL_CONFIG,
        "    missing = [key for key in needed if values.get(key) is None]",
        '    missing = [key for key in needed if values.get(key) is None and key != "rope_theta"]',
    ),
    Change(
        ARCH + "001",
        "the 1.5B preset loses its tie",
        "apr_dist/model/families/qwen2.py",
        "8960, 32_768, 1e6, 1e-6, True)",
        "8960, 32_768, 1e6, 1e-6, False)",
    ),
    Change(
        ARCH + "003",
        "theta is a constant",
        MODEL_CONFIG,
        'rope_theta=values["rope_theta"],',
        "rope_theta=1e6,",
        also=(INIT + "005",),
    ),
    Change(
        ARCH + "004",
        "grouped queries read the wrong KV head",
        PLAIN_KERNELS,
        "        key.transpose(1, 2),",
        "        key.flip(2).transpose(1, 2),",
    ),
    Change(
        ARCH + "004",
        "the bias of the keys is not built",
        ATTENTION,
        "self.k_proj = Linear(hidden, config.kv_size, bias=config.qkv_bias)",
        "self.k_proj = Linear(hidden, config.kv_size, bias=False)",
    ),
    Change(
        CHECKPOINT + "001",
        "the footer is not compared",
        READER,
        "        if stored != computed:",
        "        if stored == 0:",
    ),
    Change(
        TRAINER + "022",
        "layers share their random stream",
        "apr_dist/model/transformer.py",
        '    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()',
        '    digest = hashlib.blake2b(f"{seed}:{name[15:]}".encode(), digest_size=8).digest()',
    ),
    Change(
        TRAINER + "025",
        "a full disk is an internal error",
        ATOMIC,
        "                rest, offset = rest[written:], offset + written\n        except OSError as error:",
        "                rest, offset = rest[written:], offset + written\n        except KeyError as error:",
    ),
    Change(
        TRAINER + "030",
        "the footer is not compared",
        READER,
        "        if stored != computed:",
        "        if stored == 0:",
    ),
    Change(
        TRAINER + "033",
        "a bias is cut off from the loss",
        "apr_dist/model/layers.py",
        "        return self.kernels_for(x).linear(x, self.weight, self.bias)",
        "        bias = None if self.bias is None else self.bias.detach()\n"
        "        return self.kernels_for(x).linear(x, self.weight, bias)",
        also=(TRAINER + "034",),
    ),
    Change(
        CHECKPOINT + "010",
        "a file that failed takes the name all the same",
        "apr_dist/apr/writer.py",
        "        if kind is not None:\n            self._file.discard()",
        "        if kind is not None:\n            self._file.commit()",
    ),
    Change(
        ARCH + "CUDA-001",
        "a device changes the rotation",
        "apr_dist/model/transformer.py",
        "        self.model.rotary.reset()",
        "        pass",
    ),
)
