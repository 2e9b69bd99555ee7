// CUDA's device guard and hooks on a build of torch without CUDA: a current device per thread, streams that do
// nothing, and pinned host memory. With them autograd accepts tensors whose device is "cuda". Load it before
// torch asks for its hooks.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

namespace {

DeviceIndex device_count() {
  static const char* count = std::getenv("EMULATED_CUDA_DEVICES");
  return count ? static_cast<DeviceIndex>(std::atoi(count)) : 1;
}

thread_local DeviceIndex current = 0;

DeviceIndex exchange(DeviceIndex index) {
  DeviceIndex before = current;
  if (index >= 0) current = index;
  return before;
}

Stream default_stream(Device device) { return Stream(Stream::DEFAULT, device); }

struct Guard : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { return Device(DeviceType::CUDA, exchange(d.index())); }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { exchange(d.index()); }
  Stream getStream(Device d) const noexcept override { return default_stream(d); }
  Stream getDefaultStream(Device d) const override { return default_stream(d); }
  Stream getNewStream(Device d, int = 0) const override { return default_stream(d); }
  Stream getStreamFromGlobalPool(Device d, bool = false) const override { return default_stream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return default_stream(s.device()); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

// Host memory whose addresses are known as pinned.
struct PinnedAllocator : public c10::Allocator {
  static std::map<const char*, size_t>& blocks() {
    static auto* found = new std::map<const char*, size_t>;
    return *found;
  }
  static std::mutex& lock() {
    static auto* found = new std::mutex;
    return *found;
  }
  static void release(void* pointer) {
    std::lock_guard<std::mutex> held(lock());
    blocks().erase(static_cast<const char*>(pointer));
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = nullptr;
    TORCH_CHECK(!posix_memalign(&pointer, 64, bytes ? bytes : 1), "out of pinned memory");
    std::lock_guard<std::mutex> held(lock());
    blocks()[static_cast<const char*>(pointer)] = bytes;
    return {pointer, pointer, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  static bool holds(const void* pointer) {
    std::lock_guard<std::mutex> held(lock());
    const char* address = static_cast<const char*>(pointer);
    auto after = blocks().upper_bound(address);
    if (after == blocks().begin()) return false;
    auto block = std::prev(after);
    return address < block->first + block->second || address == block->first;
  }
};

struct Hooks : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return device_count(); }
  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { exchange(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void* pointer) const override { return PinnedAllocator::holds(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static auto* allocator = new PinnedAllocator;
    return allocator;
  }
};

int load() {
  static Guard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  at::CUDAHooksRegistry()->Register(
      "CUDAHooks", [](at::CUDAHooksArgs a) -> std::unique_ptr<at::CUDAHooksInterface> {
        return std::make_unique<Hooks>(a);
      });
  return 1;
}
int loaded = load();

}  // namespace

extern "C" int emulated_cuda_exchange_device(int index) { return exchange(static_cast<DeviceIndex>(index)); }
