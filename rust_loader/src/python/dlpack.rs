//! DLPack: handing memory of this crate to tensor libraries without copying it.
//!
//! Layout and rules are those of the DLPack specification, version 1.0: a capsule named
//! `dltensor_versioned` owns a `DLManagedTensorVersioned`; a consumer renames the capsule and calls
//! the deleter when its last tensor dies, from any thread, with or without the GIL. Every `unsafe` of
//! the Python face is in this file.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{CStr, c_void};

use pyo3::ffi;
use pyo3::prelude::*;

const NAME: &CStr = c"dltensor_versioned";
const VERSION: Version = Version { major: 1, minor: 0 };
const CPU: i32 = 1;
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
    shape: Box<[i64]>,
    strides: Box<[i64]>,
    _owner: Box<dyn Any + Send>,
}

/// Memory to be handed out as a tensor of signed integers.
pub struct Memory {
    /// First element.
    pub data: *const c_void,
    /// Bits of an element.
    pub bits: u8,
    /// Extent of each dimension.
    pub shape: Box<[i64]>,
    /// Elements from one index of a dimension to the next.
    pub strides: Box<[i64]>,
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
                    ndim: i32::try_from(self.shape.len())?,
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
        // SAFETY: `export` was made just now and nobody else knows it; the boxed slices do not move
        // when their box does, so the pointers stay good until `delete`.
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
