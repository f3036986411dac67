//! Compiled kernels, kept on disk under the hash of what they were compiled from.

use crate::error::CudaError;
use crate::gpu::{PRELUDE, Source};
use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, fs, process};

/// What all kernels are compiled with, beside the processor's name.
const OPTIONS: [&str; 2] = ["--std=c++17", "-default-device"];

/// The machine code of `source` for `arch`, from the cache or the compiler.
pub(crate) fn compiled(source: &Source, arch: &str) -> Result<Vec<u8>, CudaError> {
    let code = format!("{PRELUDE}\n{}", source.code);
    let kept = cache_dir().map(|dir| dir.join(file_name(source, arch, &code)));
    if let Some(image) = kept.as_deref().and_then(|path| fs::read(path).ok()).and_then(whole) {
        return Ok(image);
    }
    let image = compile(source.name, &code, arch)?;
    if let Some(path) = kept {
        // A cache that cannot be written costs time and nothing else.
        let _ = keep(&path, &image);
    }
    Ok(image)
}

/// `$XDG_CACHE_HOME/tailorq/kernels`, or that of the home directory.
fn cache_dir() -> Option<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME").filter(|d| !d.is_empty()).map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(env::var_os("HOME").filter(|d| !d.is_empty())?).join(".cache")))?;
    base.is_absolute().then(|| base.join("tailorq").join("kernels"))
}

fn file_name(source: &Source, arch: &str, code: &str) -> String {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both places are ours.
    let _ = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    let hash = Sha256::digest(format!("{major}.{minor} {arch} {OPTIONS:?} {code}"));
    let hex: String = hash.iter().take(16).map(|b| format!("{b:02x}")).collect();
    format!("{}-{arch}-{hex}.cubin", source.name)
}

/// Bytes of the hash behind an image.
const HASH: usize = 32;

/// The image of a kept file, unless the file is damaged: the driver is given an address without a length.
fn whole(mut kept: Vec<u8>) -> Option<Vec<u8>> {
    let hash = kept.split_off(kept.len().checked_sub(HASH)?);
    (!kept.is_empty() && Sha256::digest(&kept)[..] == hash[..]).then_some(kept)
}

/// Under a temporary name first, so that a reader sees all or nothing.
fn keep(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().expect("the path was joined to a directory");
    fs::create_dir_all(dir)?;
    // Two machines may share the folder and have processes of the same number.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let temporary = path.with_extension(format!("{}-{now}.tmp", process::id()));
    let mut file = File::create_new(&temporary)?;
    file.write_all(image)?;
    file.write_all(&Sha256::digest(image))?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Compiles to machine code.
pub(crate) fn compile(name: &'static str, code: &str, arch: &str) -> Result<Vec<u8>, CudaError> {
    let refused = |log: String| CudaError::Compile { source_name: name, arch: arch.to_owned(), log };
    let code = CString::new(code).map_err(|e| refused(e.to_string()))?;
    let program = result::create_program(&code, None).map_err(|e| refused(format!("{e:?}")))?;
    let options: Vec<String> =
        OPTIONS.iter().map(|&option| option.to_owned()).chain([format!("--gpu-architecture={arch}")]).collect();
    // SAFETY: the program was made above and is destroyed below, once.
    unsafe {
        let image = match result::compile_program(program, &options) {
            Ok(()) => image(program).map_err(|e| refused(format!("{e:?}"))),
            Err(error) => Err(refused(log(program).unwrap_or_else(|| format!("{error:?}")))),
        };
        let _ = result::destroy_program(program);
        image
    }
}

/// # Safety
/// The program is alive and was compiled.
unsafe fn image(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: as the caller promises; the vector has room for what the first call says.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
        Ok(image)
    }
}

/// # Safety
/// The program is alive.
unsafe fn log(program: sys::nvrtcProgram) -> Option<String> {
    // SAFETY: as the caller promises.
    let raw = unsafe { result::get_program_log(program) }.ok()?;
    let bytes: Vec<u8> = raw.into_iter().map(|c| c as u8).collect();
    let text = CStr::from_bytes_until_nul(&bytes).ok()?;
    Some(text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::SOURCES;

    #[test]
    fn a_damaged_file_is_no_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder").join("kernel.cubin");
        keep(&path, b"machine code").unwrap();
        let kept = fs::read(&path).unwrap();
        assert_eq!(whole(kept.clone()).as_deref(), Some(&b"machine code"[..]));
        for n in 0..kept.len() {
            assert_eq!(whole(kept[..n].to_vec()), None, "the first {n} bytes");
        }
        let mut changed = kept;
        changed[3] ^= 1;
        assert_eq!(whole(changed), None);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn every_source_compiles() {
        // SAFETY: loading the library has no preconditions.
        if !unsafe { sys::is_culib_present() } {
            println!("skipped: no NVRTC library");
            return;
        }
        for source in SOURCES {
            for arch in ["sm_80", "sm_90"] {
                let image = compile(source.name, &format!("{PRELUDE}\n{}", source.code), arch);
                assert!(image.unwrap_or_else(|e| panic!("{e}")).len() > 100, "{}", source.name);
            }
        }
    }
}
