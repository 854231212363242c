//! DLPack: handing memory of this crate to tensor libraries without copying it.
//!
//! [`Memory`] goes out; [`Foreign`] memory comes in, to be filled. Layout and rules are those of the DLPack
//! specification, version 1.0: a capsule named `dltensor_versioned` owns a `DLManagedTensorVersioned`; a consumer renames the capsule and calls
//! the deleter when its last tensor dies, from any thread, with or without the GIL. Every `unsafe` of
//! the Python face is in this file.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;

const NAME: &CStr = c"dltensor_versioned";
const CONSUMED: &CStr = c"used_dltensor_versioned";
const VERSION: Version = Version { major: 1, minor: 0 };
const CPU: i32 = 1;
const PINNED: i32 = 3;
const SIGNED_INTEGER: u8 = 0;
const READ_ONLY: u64 = 1;

#[repr(C)]
struct Version {
    major: u32,
    minor: u32,
}

#[repr(C)]
struct Device {
    kind: i32,
    id: i32,
}

#[repr(C)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct ManagedTensor {
    version: Version,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    flags: u64,
    tensor: Tensor,
}

/// The managed tensor and everything that it points to, freed together by the deleter.
#[repr(C)]
struct Export {
    managed: ManagedTensor,
    shape: [i64; 2],
    strides: [i64; 2],
    _owner: Box<dyn Any + Send>,
}

/// Memory to be handed out as a tensor of signed integers.
pub struct Memory {
    /// First element.
    pub data: *const c_void,
    /// Bits of an element.
    pub bits: u8,
    /// Dimensions: 1 or 2.
    pub dimensions: i32,
    /// Extent of each dimension; those beyond `dimensions` mean nothing.
    pub shape: [i64; 2],
    /// Elements from one index of a dimension to the next.
    pub strides: [i64; 2],
    /// False asks consumers not to write; some cannot hold a tensor to it.
    pub writable: bool,
    /// Keeps `data` alive; dropped with the last tensor.
    pub owner: Box<dyn Any + Send>,
}

impl Memory {
    /// A capsule that owns the memory until a tensor library takes it over.
    pub fn into_capsule(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let export = Box::into_raw(Box::new(Export {
            managed: ManagedTensor {
                version: VERSION,
                manager: std::ptr::null_mut(),
                deleter: Some(delete),
                flags: if self.writable { 0 } else { READ_ONLY },
                tensor: Tensor {
                    data: self.data.cast_mut(),
                    device: Device { kind: CPU, id: 0 },
                    ndim: self.dimensions,
                    dtype: DataType { code: SIGNED_INTEGER, bits: self.bits, lanes: 1 },
                    shape: std::ptr::null_mut(),
                    strides: std::ptr::null_mut(),
                    byte_offset: 0,
                },
            },
            shape: self.shape,
            strides: self.strides,
            _owner: self.owner,
        }));
        // SAFETY: `export` was made just now and nobody else knows it; it is boxed and does not move, so
        // the pointers into it stay good until `delete`.
        unsafe {
            (*export).managed.tensor.shape = (*export).shape.as_mut_ptr();
            (*export).managed.tensor.strides = (*export).strides.as_mut_ptr();
        }
        // SAFETY: we are attached to the interpreter (`py`); the name is static; on success the
        // capsule owns `export`, on failure it is null and `export` is freed here.
        unsafe {
            let capsule = ffi::PyCapsule_New(export.cast(), NAME.as_ptr(), Some(destroy_capsule));
            if capsule.is_null() {
                delete(export.cast());
            }
            Ok(Bound::from_owned_ptr_or_err(py, capsule)?.unbind())
        }
    }
}

/// Frees an export. Called once: by the consumer, or by the capsule that no consumer took.
unsafe extern "C" fn delete(managed: *mut ManagedTensor) {
    // SAFETY: `managed` is the first field of an `Export` that `into_capsule` boxed, and the
    // specification allows one call.
    drop(unsafe { Box::from_raw(managed.cast::<Export>()) });
}

unsafe extern "C" fn destroy_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter calls this with a live capsule; one that was consumed carries another
    // name, so that an export is only taken here when nobody else has it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}

/// Memory of a tensor that Python made, to be filled by this crate.
#[derive(Debug)]
pub struct Foreign {
    managed: NonNull<ManagedTensor>,
    bytes: usize,
}

// SAFETY: the specification lets any thread call the deleter, and the memory is plain bytes that only
// the owner of this value touches: whoever hands the tensor over must not use it until it is filled.
unsafe impl Send for Foreign {}

impl Foreign {
    /// Takes over the tensor in `capsule`: contiguous, writable, in host memory, of `bits` a element.
    pub fn from_capsule(capsule: &Bound<'_, PyAny>, bits: u8) -> PyResult<Self> {
        let object = capsule.as_ptr();
        // SAFETY: we are attached and `object` is alive; a capsule of this name holds a managed tensor,
        // and renaming it makes us the one to call its deleter.
        let managed = unsafe {
            if ffi::PyCapsule_IsValid(object, NAME.as_ptr()) != 1 {
                return Err(PyValueError::new_err("not a DLPack capsule of version 1"));
            }
            let managed = ffi::PyCapsule_GetPointer(object, NAME.as_ptr()).cast::<ManagedTensor>();
            ffi::PyCapsule_SetName(object, CONSUMED.as_ptr());
            managed
        };
        let managed = NonNull::new(managed).ok_or_else(|| PyValueError::new_err("an empty capsule"))?;
        let mut foreign = Self { managed, bytes: 0 };
        foreign.bytes = foreign.checked_bytes(bits)?;
        Ok(foreign)
    }

    fn checked_bytes(&self, bits: u8) -> PyResult<usize> {
        // SAFETY: `managed` is ours and was filled in by its producer as the specification says; shape
        // and strides, where given, hold `ndim` numbers.
        let (managed, shape, strides) = unsafe {
            let managed = self.managed.as_ref();
            let extents = usize::try_from(managed.tensor.ndim)?;
            let shape = std::slice::from_raw_parts(managed.tensor.shape, extents);
            let strides = NonNull::new(managed.tensor.strides)
                .map(|strides| std::slice::from_raw_parts(strides.as_ptr(), extents));
            (managed, shape, strides)
        };
        let mut elements = 1;
        let mut contiguous = true;
        for (place, extent) in shape.iter().enumerate().rev() {
            contiguous &= *extent == 1 || strides.is_none_or(|strides| strides[place] == elements);
            elements *= extent;
        }
        let tensor = &managed.tensor;
        let host = [CPU, PINNED].contains(&tensor.device.kind) && managed.flags & READ_ONLY == 0;
        let plain = tensor.dtype.bits == bits && tensor.dtype.lanes == 1 && tensor.byte_offset == 0;
        if !(host && plain && contiguous) {
            return Err(PyValueError::new_err("the buffer is not contiguous, writable host memory"));
        }
        Ok(usize::try_from(elements)? * usize::from(bits / 8))
    }

    /// The tensor's memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `checked_bytes` worked the length out from shape and type; the memory is alive until
        // the deleter is called, writable, and nobody else's meanwhile (see `Send`).
        unsafe { std::slice::from_raw_parts_mut(self.managed.as_ref().tensor.data.cast(), self.bytes) }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: the capsule was renamed when it was taken over, so nobody else calls the deleter.
        unsafe {
            if let Some(deleter) = self.managed.as_ref().deleter {
                deleter(self.managed.as_ptr());
            }
        }
    }
}
