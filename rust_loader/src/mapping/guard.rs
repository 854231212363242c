//! Copying out of a map whose file may be cut off meanwhile.
//!
//! Touching a page that a file no longer has raises SIGBUS, which ends a process. Here a handler puts a
//! page of zeros in its place and marks the map as lost, so that the copy ends and its caller can say which
//! shard it was. Faults anywhere else go on to whoever handled the signal before.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, compiler_fence};

use libc::{c_int, c_void, siginfo_t};

thread_local! {
    /// What this thread copies from now; read by the handler on the same thread. Constant, without a
    /// destructor: so looking at it in a handler runs nothing.
    static COPYING: Copying = const { Copying::nothing() };
}

struct Copying {
    begin: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicPtr<AtomicBool>,
}

impl Copying {
    const fn nothing() -> Self {
        Self { begin: AtomicUsize::new(0), end: AtomicUsize::new(0), lost: AtomicPtr::new(null_mut()) }
    }
}

/// Runs `copy`, which reads `bytes` from `from` on in a map; false when pages of that map were lost, now or
/// before: what was copied may then hold zeros.
pub fn guarded(from: *const u32, bytes: usize, lost: &AtomicBool, copy: impl FnOnce()) -> bool {
    COPYING.with(|copying| {
        copying.lost.store(std::ptr::from_ref(lost).cast_mut(), Ordering::Relaxed);
        copying.begin.store(from.addr(), Ordering::Relaxed);
        copying.end.store(from.addr() + bytes, Ordering::Relaxed);
        // The handler runs on this thread: only the compiler must not move the copy over these lines.
        compiler_fence(Ordering::SeqCst);
        copy();
        compiler_fence(Ordering::SeqCst);
        copying.end.store(0, Ordering::Relaxed);
    });
    !lost.load(Ordering::Acquire)
}

/// What handled the signal before, and the size of a page. Written once, before the handler is there.
struct Before {
    action: UnsafeCell<MaybeUninit<libc::sigaction>>,
    page: AtomicUsize,
}

// SAFETY: `action` is written inside `INSTALL` only, which orders it before every fault that the handler
// answers for; afterwards it is only read.
unsafe impl Sync for Before {}

static BEFORE: Before =
    Before { action: UnsafeCell::new(MaybeUninit::zeroed()), page: AtomicUsize::new(4096) };
static INSTALL: Once = Once::new();

/// Puts the handler in place, once a process. A child that is forked has it too.
pub fn install() {
    INSTALL.call_once(|| {
        // SAFETY: plain questions and settings with valid, initialised arguments: a zeroed `sigaction` is a
        // valid one, and `answer` has the type that SA_SIGINFO asks for.
        unsafe {
            if let Ok(page) = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)) {
                BEFORE.page.store(page, Ordering::Relaxed);
            }
            libc::sigaction(libc::SIGBUS, std::ptr::null(), BEFORE.action.get().cast());
            let mut ours: libc::sigaction = MaybeUninit::zeroed().assume_init();
            ours.sa_sigaction = answer as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut ours.sa_mask);
            // Where it is refused, a lost page ends the process, as it does without this module.
            libc::sigaction(libc::SIGBUS, &raw const ours, null_mut());
        }
    });
}

/// The handler. Calls nothing but `mmap`, `sigaction` and `raise`.
extern "C" fn answer(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the system passes a valid `info`; for a fault it holds the address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    let ours = COPYING.with(|copying| {
        let (begin, end) = (copying.begin.load(Ordering::Relaxed), copying.end.load(Ordering::Relaxed));
        if code <= 0 {
            // Raised, not a fault: by a handler that was put on top of this one, saw a fault of ours, and
            // took itself away. The fault comes again.
            return end != 0;
        }
        if !(begin..end).contains(&address) {
            return false;
        }
        // SAFETY: while a copy is under way, `lost` is a reference that `guarded` holds.
        if let Some(lost) = unsafe { copying.lost.load(Ordering::Relaxed).as_ref() } {
            // Before the page is there: who reads its zeros on another thread must find this set.
            lost.store(true, Ordering::SeqCst);
        }
        replace(address)
    });
    if !ours {
        pass_on(signal, info, context);
    }
}

/// Puts a page of zeros where `address` lies.
fn replace(address: usize) -> bool {
    let page = BEFORE.page.load(Ordering::Relaxed);
    let place = std::ptr::without_provenance_mut(address / page * page);
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the page belongs to a live map (a copy out of it is under way) and has no content any more;
    // nothing but raw pointers leads into maps.
    unsafe { libc::mmap(place, page, libc::PROT_READ, flags, -1, 0) != libc::MAP_FAILED }
}

fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: `action` was filled in before this handler was installed. A handler in it has the type that its
    // flags say; without one, the default is restored and the signal raised again: it ends the process when
    // this handler returns.
    unsafe {
        let before = (*BEFORE.action.get()).assume_init_ref();
        match before.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = MaybeUninit::zeroed().assume_init();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const default, null_mut());
                libc::raise(signal);
            }
            handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}
