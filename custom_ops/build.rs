//! Keeps the library mapped: ONNX Runtime unloads a custom-op library with its last session,
//! which would leave dangling code behind thread-local destructors and cached devices.
fn main() {
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
