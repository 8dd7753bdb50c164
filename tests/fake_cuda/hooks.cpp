// What a CPU build of torch asks about CUDA, answered as a machine with one card would: there is a device 0, its streams
// have nothing to wait for, its random numbers are the CPU's. Enough for autograd, autocast and generators of tensors
// that say cuda:0; nothing is computed here. With FAKE_DEVICE=mps it is Apple's device that is there, and no CUDA.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
#include <string>

namespace {

bool mac() {
  const char* asked = std::getenv("FAKE_DEVICE");
  return asked && std::string(asked) == "mps";
}

// By this name torch looks for it.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return !mac(); }
  bool hasPrimaryContext(at::DeviceIndex) const override { return false; }
  bool isBuilt() const override { return !mac(); }
  bool isAvailable() const override { return !mac(); }
  at::DeviceIndex deviceCount() const override { return !mac(); }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(at::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

struct MPSHooks : at::MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return mac(); }
  bool isBuilt() const override { return mac(); }
  bool isAvailable() const override { return mac(); }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return false; }
  at::Generator getNewGenerator(at::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

using Kind = c10::DeviceType;

template <Kind kind>
struct Guard : c10::impl::NoOpDeviceGuardImpl<kind> {
  static c10::Device card() { return c10::Device(kind, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, card()); }
  c10::Device exchangeDevice(c10::Device) const override { return card(); }
  c10::Device getDevice() const override { return card(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
REGISTER_MPS_HOOKS(MPSHooks)
}
// One of them: torch takes a guard for a device that is there.
static c10::impl::DeviceGuardImplRegistrar there =
    mac() ? c10::impl::DeviceGuardImplRegistrar(Kind::MPS, new Guard<Kind::MPS>())
          : c10::impl::DeviceGuardImplRegistrar(Kind::CUDA, new Guard<Kind::CUDA>());
