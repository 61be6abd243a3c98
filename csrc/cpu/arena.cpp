#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"

namespace fusedres {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallestBlock = size_t{1} << 16;

struct Free {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

struct Block {
  std::unique_ptr<std::byte, Free> memory;
  size_t size;
};

struct Blocks {
  std::vector<Block> blocks;
  size_t used = 0;  // of the last block
  size_t live = 0;  // taken of all blocks and not given back
  size_t most = 0;  // that was ever live
  int arenas = 0;
};

thread_local Blocks scratch;

}  // namespace

void* Arena::take_bytes(size_t bytes) {
  auto& [blocks, used, live, most, _] = scratch;
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  live += bytes;
  most = std::max(most, live);
  if (blocks.empty() || used + bytes > blocks.back().size) {
    const size_t size = std::max(blocks.empty() ? most : bytes, kSmallestBlock);
    auto* memory = static_cast<std::byte*>(::operator new(size, std::align_val_t{kAlignment}));
    blocks.push_back({std::unique_ptr<std::byte, Free>(memory), size});
    used = 0;
  }
  std::byte* taken = blocks.back().memory.get() + used;
  used += bytes;
  return taken;
}

Arena::Arena() : blocks_(scratch.blocks.size()), used_(scratch.used), live_(scratch.live) {
  ++scratch.arenas;
}

Arena::~Arena() {
  auto& [blocks, used, live, _, arenas] = scratch;
  live = live_;
  if (--arenas) {
    if (blocks.size() == blocks_) used = used_;
    return;
  }
  if (blocks.size() > 1) blocks.clear();  // the next one is as large as all of them need
  used = 0;
}

}  // namespace fusedres
