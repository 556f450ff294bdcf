//! The kernels' machine code, embedded by build.rs.

use std::io::Read;

use super::{driver::Gpu, error::CudaError};

/// What an image runs on, by compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "a build without kernels has no images")]
pub(crate) enum Target {
    Machine(u32),
    Ptx(u32),
}

pub(crate) struct Image {
    file: &'static str,
    target: Target,
    /// zlib.
    code: &'static [u8],
}

impl Image {
    fn unpacked(&self) -> std::io::Result<Vec<u8>> {
        let mut code = Vec::new();
        flate2::read::ZlibDecoder::new(self.code).read_to_end(&mut code)?;
        Ok(code)
    }
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Whether the build had no compiler for kernels.
pub(crate) fn none() -> bool {
    IMAGES.is_empty()
}

/// The oldest compute capability that kernels were built for.
pub(crate) fn oldest() -> u32 {
    let capabilities = IMAGES.iter().map(|image| match image.target {
        Target::Machine(c) | Target::Ptx(c) => c,
    });
    capabilities.min().unwrap_or(0)
}

/// The code of `file` for a GPU, ready to be loaded: machine code of its architecture, else of an
/// older one of its generation, else PTX. `None` where the file isn't for this GPU at all.
pub(crate) fn code(file: &'static str, gpu: &Gpu) -> Result<Option<Vec<u8>>, CudaError> {
    let of_file = || IMAGES.iter().filter(|image| image.file == file);
    let special = of_file().all(|image| matches!(image.target, Target::Machine(_)));
    let capability = gpu.capability();
    let machine = of_file()
        .filter_map(|image| match image.target {
            Target::Machine(c) if c / 10 == capability / 10 && c <= capability => Some((c, image)),
            _ => None,
        })
        // What uses one architecture's own instructions runs nowhere else.
        .filter(|(c, _)| !special || *c == capability)
        .max_by_key(|(c, _)| *c)
        .map(|(_, image)| image);
    let ptx = of_file().find(|image| matches!(image.target, Target::Ptx(c) if c <= capability));
    let chosen = match gpu.options().oldest_code {
        true => ptx,
        false => machine.or(ptx),
    };
    let Some(image) = chosen else {
        return Ok(None);
    };
    let mut code = image.unpacked().map_err(|e| CudaError::Image {
        file,
        message: e.to_string(),
    })?;
    // PTX is a string to the driver.
    code.push(0);
    Ok(Some(code))
}

/// All machine code for one compute capability.
#[cfg(test)]
pub(crate) fn machine_code(capability: u32) -> Vec<Vec<u8>> {
    IMAGES
        .iter()
        .filter(|image| image.target == Target::Machine(capability))
        .map(|image| image.unpacked().unwrap())
        .collect()
}
