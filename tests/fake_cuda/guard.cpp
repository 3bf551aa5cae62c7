// A device guard for CUDA that does nothing, by which a CPU build of torch differentiates fake CUDA tensors: its
// autograd engine asks for the device's streams.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
    explicit CUDAHooks(CUDAHooksArgs) {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    void init() const override {}
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(DeviceIndex) const override {}
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

struct Guard final : c10::impl::DeviceGuardImplInterface {
    static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
    c10::DeviceType type() const override { return static_type; }
    Device exchangeDevice(Device) const override { return getDevice(); }
    Device getDevice() const override { return {static_type, 0}; }
    void setDevice(Device) const override {}
    void uncheckedSetDevice(Device) const noexcept override {}
    Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
    Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
    Stream exchangeStream(Stream stream) const override { return Stream(Stream::DEFAULT, stream.device()); }
    DeviceIndex deviceCount() const noexcept override { return 1; }
    void record(void **, const Stream &, DeviceIndex, c10::EventFlag) const override {}
    void block(void *, const Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
    void destroyEvent(void *, DeviceIndex) const noexcept override {}
    bool queryStream(const Stream &) const override { return true; }
    void synchronizeStream(const Stream &) const override {}
    void synchronizeDevice(DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
} // namespace
