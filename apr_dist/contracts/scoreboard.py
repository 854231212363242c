"""The scoreboard of all contracts as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from apr_dist.contracts.overview import ContractRow, StatusRow
from apr_dist.contracts.schema import Level

_STYLE = """
:root { color-scheme: light dark }
:root { --line: #8884; --good: #2e8b57; --some: #b8860b; --none: #888; --bad: #c0392b }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } code { font-size: 85%; overflow-wrap: anywhere }
.DISCHARGED, .FUNCTIONAL, .passed { color: var(--good) } .PARTIAL_ALGORITHM_LEVEL { color: var(--some) }
.PROPOSED, .not { color: var(--none) } .failed { color: var(--bad); font-weight: 600 }
"""


def totals(rows: Sequence[StatusRow]) -> str:
    """One sentence with the counts of a table."""
    counts = {level: sum(row.shown is level for row in rows) for level in Level}
    parts = [f"{count} {level}" for level, count in counts.items() if count]
    killed = sum(row.killed > 0 for row in rows)
    return f"{len(rows)} falsifiers: {', '.join(parts)}; {killed} with a mutant that turned their test red"


def markdown(contracts: Sequence[ContractRow], rows: Sequence[StatusRow]) -> str:
    """The scoreboard as Markdown."""
    lines = ["# Scoreboard of the contracts", "", totals(rows) + ".", ""]
    lines += ["| contract | version | status | bound |", "|---|---|---|---|"]
    lines += [f"| {c.id} | {c.version} | {c.status} | {c.bound} of {c.falsifiers} |" for c in contracts]
    for contract in contracts:
        lines += ["", f"## {contract.id}", "", contract.description, ""]
        lines += ["| falsifier | rule | kind | tests | last result | mutants killed | level |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_markdown_row(row) for row in rows if row.contract == contract.id]
    return "\n".join(lines) + "\n"


def html_page(contracts: Sequence[ContractRow], rows: Sequence[StatusRow]) -> str:
    """The scoreboard as one HTML page without scripts, fonts or pictures from elsewhere."""
    body = [f"<h1>Scoreboard of the contracts</h1><p>{html.escape(totals(rows))}.</p>"]
    body.append("<table><tr><th>contract<th>version<th>status<th>bound</tr>")
    body += [
        f'<tr><td><a href="#{c.id}">{c.id}</a><td>{html.escape(c.version)}<td class="{c.status}">{c.status}'
        f"<td>{c.bound} of {c.falsifiers}</tr>"
        for c in contracts
    ]
    body.append("</table>")
    for contract in contracts:
        body.append(f'<h2 id="{contract.id}">{contract.id}</h2><p>{html.escape(contract.description)}</p>')
        body.append(
            "<table><tr><th>falsifier<th>rule<th>kind<th>tests<th>last result<th>mutants<th>level</tr>"
        )
        body += [_html_row(row) for row in rows if row.contract == contract.id]
        body.append("</table>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Scoreboard of the contracts</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _markdown_row(row: StatusRow) -> str:
    tests = "<br>".join(f"`{node.removeprefix('tests/')}`" for node in row.tests) or "-"
    meaning = row.meaning.replace("|", "\\|")
    mutants = f"{row.killed} of {row.mutants}" if row.mutants else "-"
    return f"| {row.id} | {meaning} | {row.kind} | {tests} | {row.last_result} | {mutants} | {row.shown} |"


def _html_row(row: StatusRow) -> str:
    tests = "<br>".join(f"<code>{html.escape(node.removeprefix('tests/'))}</code>" for node in row.tests)
    mutants = f"{row.killed} of {row.mutants}" if row.mutants else "-"
    state = row.last_result.split(",")[0].split()[0]
    return (
        f"<tr><td><code>{row.id}</code><td>{html.escape(row.meaning)}<td>{row.kind}<td>{tests or '-'}"
        f'<td class="{html.escape(state)}">{html.escape(row.last_result)}<td>{mutants}'
        f'<td class="{row.shown}">{row.shown}</tr>'
    )
