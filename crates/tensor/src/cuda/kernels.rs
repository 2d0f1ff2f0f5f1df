//! From CUDA C++ to cubin: NVRTC, found at run time, and a cache on disk by the hash of everything that goes in.

use std::ffi::{CString, c_char};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::{env, fs, process};

use cudarc::driver::sys as driver;
use cudarc::nvrtc::{result, sys as nvrtc};

use super::CudaError;
use crate::DType;

/// What every kernel file starts with.
const PRELUDE: &str = include_str!("../ops/prelude.cuh");

/// What follows once the element type is known.
const PACKS: &str = include_str!("../ops/packs.cuh");

/// One operation's kernels.
pub(crate) struct Source {
    /// The operation's folder.
    pub(crate) name: &'static str,
    /// `kernel.cu`.
    pub(crate) text: &'static str,
}

/// By name: variants are looked up at every launch.
impl PartialEq for Source {
    fn eq(&self, other: &Source) -> bool {
        self.name == other.name
    }
}

impl Eq for Source {}

impl Hash for Source {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

/// A source as it is compiled.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) source: &'static Source,
    /// What `T` is: the element type of activations.
    element: DType,
    /// Names that the source uses and does not define.
    constants: Vec<(&'static str, usize)>,
}

impl Source {
    /// The kernels for activations of type `element`, f32 or bf16.
    pub(crate) fn of(&'static self, element: DType) -> Variant {
        self.with(element, &[])
    }

    /// [`Source::of`] with constants.
    pub(crate) fn with(&'static self, element: DType, constants: &[(&'static str, usize)]) -> Variant {
        assert!(matches!(element, DType::F32 | DType::Bf16), "no kernels of {} for {element:?}", self.name);
        Variant { source: self, element, constants: constants.to_vec() }
    }
}

impl From<&'static Source> for Variant {
    fn from(source: &'static Source) -> Variant {
        source.of(DType::F32)
    }
}

impl Variant {
    /// What stands between prelude and source.
    fn header(&self) -> String {
        let element = if self.element == DType::Bf16 { "bf16" } else { "float" };
        let constants =
            self.constants.iter().map(|(name, value)| format!("constexpr int {name} = {value};\n"));
        format!("typedef {element} T;\n{}{}", constants.collect::<String>(), PACKS)
    }
}

/// The kernels of an operation: `source!("add")` in `ops/add/cuda.rs`.
macro_rules! source {
    ($name:literal) => {
        $crate::cuda::Source { name: $name, text: include_str!("kernel.cu") }
    };
}
pub(crate) use source;

/// Where a library was looked for, without the old and misspelt names that are tried too.
pub(super) fn searched(library: &str) -> String {
    let names = cudarc::get_lib_name_candidates(library).into_iter();
    let plain: Vec<String> = names.filter(|n| n.starts_with(&format!("lib{library}.so"))).collect();
    format!("LD_LIBRARY_PATH and the system's folders for {}", plain.join(", "))
}

/// An error that says what was searched, if there is no NVIDIA driver here.
pub(super) fn need_driver() -> Result<(), CudaError> {
    // SAFETY: loads and unloads the driver library, which is made for it.
    if unsafe { driver::is_culib_present() } {
        return Ok(());
    }
    Err(CudaError::Library {
        library: "NVIDIA driver",
        searched: searched("cuda"),
        remedy: "install one, or use the CPU",
    })
}

/// An error that says what was searched, if there is no NVRTC here.
pub(super) fn need_compiler() -> Result<(), CudaError> {
    // SAFETY: as above.
    if unsafe { nvrtc::is_culib_present() } {
        return Ok(());
    }
    Err(CudaError::Library {
        library: "CUDA kernel compiler (NVRTC)",
        searched: searched("nvrtc"),
        remedy: "install the CUDA toolkit's runtime libraries or the wheel nvidia-cuda-nvrtc, and name their folder \
                 in LD_LIBRARY_PATH",
    })
}

/// The architecture to compile for. Hopper's own instructions need its `a` target.
pub(super) fn target(major: i32, minor: i32) -> String {
    match (major, minor) {
        (9, 0) => "sm_90a".into(),
        _ => format!("sm_{major}{minor}"),
    }
}

/// The compiled kernels of `source`, from the cache on disk if they are there.
pub(super) fn cubin(source: &Variant, target: &str) -> Result<Vec<u8>, CudaError> {
    let file = cache_file(source, target);
    if let Some(cubin) = file.as_ref().and_then(|f| fs::read(f).ok()).and_then(unsealed) {
        return Ok(cubin);
    }
    let cubin = compile(source, target)?;
    // A cache that cannot be written (a full disk, a read-only home) costs time and nothing else.
    if let Some(file) = file {
        let _ = write_cached(&file, &sealed(&cubin));
    }
    Ok(cubin)
}

/// Where what was compiled and measured is kept: `$GPUSQ_CACHE`, `$XDG_CACHE_HOME/gpusq` or `~/.cache/gpusq`.
pub fn cache_folder() -> Option<PathBuf> {
    match (env::var_os("GPUSQ_CACHE"), env::var_os("XDG_CACHE_HOME"), env::var_os("HOME")) {
        (Some(dir), _, _) => Some(PathBuf::from(dir)),
        (_, Some(dir), _) => Some(PathBuf::from(dir).join("gpusq")),
        (_, _, Some(home)) => Some(PathBuf::from(home).join(".cache/gpusq")),
        _ => None,
    }
}

fn compiler_version() -> String {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers.
    unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) };
    format!("nvrtc {major}.{minor}")
}

/// The driver's interface, as CUDA numbers it (12030 is 12.3).
pub(super) fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: writes an integer.
    unsafe { driver::cuDriverGetVersion(&mut version) };
    version
}

/// Versions of the driver's interface and of the kernel compiler, once a GPU was opened.
pub fn versions() -> String {
    let driver = driver_version();
    format!("CUDA driver {}.{}, {}", driver / 1000, driver % 1000 / 10, compiler_version())
}

fn cache_file(variant: &Variant, target: &str) -> Option<PathBuf> {
    let version = compiler_version();
    let hash = fnv([PRELUDE, &variant.header(), variant.source.text, target, &version].join("\0").as_bytes());
    Some(cache_folder()?.join(format!("kernels/{}-{target}-{hash:016x}.cubin", variant.source.name)))
}

/// FNV-1a: the same in every build, unlike the standard library's hasher.
pub fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ *b as u64).wrapping_mul(0x0100_0000_01B3))
}

/// The image and its checksum, as the cache holds it.
fn sealed(cubin: &[u8]) -> Vec<u8> {
    [cubin, &fnv(cubin).to_le_bytes()[..]].concat()
}

/// The image without the checksum that ends the file; `None` if they disagree (a torn or edited file).
fn unsealed(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let at = file.len().checked_sub(8)?;
    let sum = u64::from_le_bytes(file[at..].try_into().ok()?);
    file.truncate(at);
    (fnv(&file) == sum).then_some(file)
}

/// Writes a file of the cache and its folder.
///
/// # Errors
/// What the file system says; a cache can be done without.
pub fn write_cached(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(file.parent().expect("has a folder"))?;
    // Renamed into place, so that processes that start together never read half a file.
    let part = file.with_extension(format!("{}.part", process::id()));
    fs::write(&part, bytes)?;
    fs::rename(part, file)
}

/// Compiles `source` for `target`; the error has the compiler's log.
pub(super) fn compile(variant: &Variant, target: &str) -> Result<Vec<u8>, CudaError> {
    compile_with_log(variant, target, &[]).map(|(cubin, _)| cubin)
}

/// [`compile`] with more options; gives the compiler's log too.
fn compile_with_log(variant: &Variant, target: &str, more: &[&str]) -> Result<(Vec<u8>, String), CudaError> {
    let source = variant.source;
    let failed = |log: String| CudaError::Compile { source_name: source.name, target: target.into(), log };
    let line = "\n#line 1 \"kernel.cu\"\n";
    let text = CString::new([PRELUDE, "\n", &variant.header(), line, source.text].concat())
        .map_err(|_| failed("the source has a NUL".into()))?;
    let program = result::create_program(&text, None).map_err(|e| failed(format!("{e:?}")))?;
    let mut options =
        vec![format!("--gpu-architecture={target}"), "--std=c++17".into(), "-default-device".into()];
    options.extend(more.iter().map(|s| s.to_string()));
    // SAFETY: `program` is live until destroyed below, and the buffers have the sizes NVRTC gives.
    unsafe {
        let compiled = result::compile_program(program, &options);
        let log: Vec<c_char> = result::get_program_log(program).unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
        let log = String::from_utf8_lossy(&log).into_owned();
        let out = match compiled {
            Err(e) => Err(failed(format!("{e:?}\n{log}"))),
            Ok(()) => image(program).map_err(|e| failed(format!("{e:?}"))).map(|cubin| (cubin, log)),
        };
        let _ = result::destroy_program(program);
        out
    }
}

/// # Safety
/// `program` must be live and compiled.
unsafe fn image(program: nvrtc::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0usize;
    // SAFETY: as the caller promises; the buffer has the size NVRTC gives.
    unsafe {
        nvrtc::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut cubin = vec![0u8; size];
        nvrtc::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()?;
        Ok(cubin)
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    /// Whether NVRTC is here. `GPUSQ_NEED_NVRTC` makes its absence a failure.
    fn compiler() -> bool {
        match need_compiler() {
            Ok(()) => true,
            Err(e) => {
                assert!(env::var_os("GPUSQ_NEED_NVRTC").is_none(), "GPUSQ_NEED_NVRTC is set: {e}");
                println!("skipped: {e}");
                false
            }
        }
    }

    /// Every kernel compiles for every architecture the project names. Needs NVRTC, no GPU.
    #[test]
    fn every_kernel_compiles_to_cubin() {
        if !compiler() {
            return;
        }
        let both = [DType::F32, DType::Bf16];
        let plain = crate::ops::SOURCES.iter().flat_map(|s| both.map(|element| s.of(element)));
        let (any, hopper) = crate::ops::variants();
        let targets = ["sm_80", "sm_89", "sm_90a"];
        let mut variants: Vec<(Variant, &[&str])> = plain.chain(any).map(|v| (v, &targets[..])).collect();
        variants.extend(hopper.into_iter().map(|v| (v, &targets[2..])));
        // With --nocapture and GPUSQ_REGISTERS, what each kernel of this source, or of `all`, takes: registers, spills.
        let shown = env::var("GPUSQ_REGISTERS").unwrap_or_default();
        variants.par_iter().for_each(|(variant, targets)| {
            for target in *targets {
                let (cubin, log) = compile_with_log(variant, target, &["--ptxas-options=-v"])
                    .unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(&cubin[..4], b"\x7fELF", "{} {target}", variant.source.name);
                // A machine with this folder starts as if it had compiled all kernels before.
                if let (Some(_), Some(file)) = (env::var_os("GPUSQ_CACHE"), cache_file(variant, target)) {
                    write_cached(&file, &sealed(&cubin)).unwrap();
                }
                if shown == "all" || variant.source.name == shown {
                    println!("{} {:?} {target}\n{log}", variant.header(), variant.element);
                }
            }
        });
    }

    #[test]
    fn a_kernel_that_does_not_compile_says_where_when_cubin_is_asked_for() {
        if !compiler() {
            return;
        }
        static BAD: Source =
            Source { name: "bad", text: "extern \"C\" __global__ void f() {\n  nonsense;\n}" };
        let e = compile(&(&BAD).into(), "sm_80").unwrap_err().to_string();
        assert!(e.contains("bad") && e.contains("kernel.cu(2)") && e.contains("nonsense"), "{e}");
    }

    #[test]
    fn a_damaged_cache_file_is_compiled_again_not_loaded() {
        let mut file = sealed(b"image");
        assert_eq!(unsealed(file.clone()).unwrap(), b"image");
        file[1] ^= 1;
        assert!(unsealed(file).is_none() && unsealed(vec![1, 2]).is_none());
    }
}
