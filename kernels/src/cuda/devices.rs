//! The devices that the CUDA driver shows to this process, without a context on any of them.
#![allow(unsafe_code)]

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};

use super::{CudaError, driver};

/// One device, numbered as the CUDA runtime and ONNX Runtime number it: `CUDA_VISIBLE_DEVICES` and
/// `CUDA_DEVICE_ORDER` have been applied by the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// CUDA ordinal.
    pub ordinal: u32,
    /// For example `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// UUID of the device, or of the MIG instance that the process was given, as
    /// `8-4-4-4-12` hexadecimal digits.
    pub uuid: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Bytes of device memory.
    pub total_bytes: u64,
}

/// The devices of this process, in the order of their ordinals.
///
/// # Errors
/// No driver, or a driver that shows no device; the reason is its own.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    driver::init()?;
    let count = result::device::get_count().map_err(|e| call("cuDeviceGetCount", e))?;
    (0..u32::try_from(count).unwrap_or(0)).map(describe).collect()
}

fn describe(ordinal: u32) -> Result<DeviceInfo, CudaError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal.cast_signed()).map_err(|e| call("cuDeviceGet", e))?;
    let name = result::device::get_name(device).map_err(|e| call("cuDeviceGetName", e))?;
    // The second version tells MIG instances of one GPU apart.
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: `uuid` is writable and `device` came from `cuDeviceGet`.
    unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }
        .result()
        .map_err(|e| call("cuDeviceGetUuid_v2", e))?;
    let attribute = |attribute| {
        // SAFETY: `device` came from `cuDeviceGet`.
        unsafe { result::device::get_attribute(device, attribute) }
            .map(|value| u32::try_from(value).unwrap_or(0))
            .map_err(|e| call("cuDeviceGetAttribute", e))
    };
    // SAFETY: as above.
    let total = unsafe { result::device::total_mem(device) };
    Ok(DeviceInfo {
        ordinal,
        name,
        // A c_char is signed on x86 and unsigned on Arm.
        uuid: hyphenated(uuid.bytes.map(|byte| byte.to_ne_bytes()[0])),
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        total_bytes: total.map_err(|e| call("cuDeviceTotalMem_v2", e))? as u64,
    })
}

fn call(call: &'static str, error: DriverError) -> CudaError {
    CudaError::Call { call, reason: error.to_string() }
}

/// `8-4-4-4-12` hexadecimal digits.
fn hyphenated(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_written_as_nvml_writes_them() {
        let bytes = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(hyphenated(bytes), "00112233-4455-6677-8899-aabbccddeeff");
    }

    #[test]
    fn without_a_driver_the_error_names_it() {
        match devices() {
            Ok(found) => assert!(found.iter().all(|d| d.total_bytes > 0 && !d.name.is_empty())),
            Err(CudaError::Library { library, .. }) => assert!(library.contains("libcuda")),
            Err(error) => assert!(error.to_string().contains("cuInit"), "{error}"),
        }
    }
}
