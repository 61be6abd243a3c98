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
  int arenas = 0;
};

thread_local Blocks scratch;

}  // namespace

void* Arena::take_bytes(size_t bytes) {
  auto& [blocks, used, _] = scratch;
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (blocks.empty() || used + bytes > blocks.back().size) {
    size_t size = blocks.empty() ? kSmallestBlock : 2 * blocks.back().size;
    while (size < bytes) size *= 2;
    auto* memory = static_cast<std::byte*>(::operator new(size, std::align_val_t{kAlignment}));
    blocks.push_back({std::unique_ptr<std::byte, Free>(memory), size});
    used = 0;
  }
  std::byte* taken = blocks.back().memory.get() + used;
  used += bytes;
  return taken;
}

Arena::Arena() : blocks_(scratch.blocks.size()), used_(scratch.used) { ++scratch.arenas; }

Arena::~Arena() {
  auto& [blocks, used, arenas] = scratch;
  if (--arenas) {
    if (blocks.size() == blocks_) used = used_;
    return;
  }
  if (blocks.size() > 1) blocks.erase(blocks.begin(), blocks.end() - 1);
  used = 0;
}

}  // namespace fusedres
