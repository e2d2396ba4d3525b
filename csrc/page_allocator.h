// Reference-counted pages of the KV cache.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "views.h"

namespace sip {

// A page list, buffer or size breaks a rule; nothing was changed.
struct PageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// More pages were asked for than are free; none was taken.
struct OutOfPages : std::runtime_error {
  OutOfPages(int64_t asked, int64_t free) : std::runtime_error("out of pages"), asked(asked), free(free) {}
  int64_t asked;
  int64_t free;
};

// Hands out the lowest free page numbers first, so that fresh allocations are contiguous runs. Every call
// does all of its work or none. Not thread-safe: callers hold the interpreter lock.
class PageAllocator {
 public:
  explicit PageAllocator(int64_t num_pages);

  // Takes `count` pages, each with one reference, in ascending order.
  std::vector<int32_t> allocate(int64_t count);
  // Adds one reference for every entry; all pages must be held.
  void retain(Span<const int32_t> pages);
  // Drops one reference for every entry; a page without references is free.
  void release(Span<const int32_t> pages);

  int32_t ref_count(int64_t page) const;
  int64_t num_free() const { return num_free_; }
  int64_t num_used() const { return num_pages() - num_free_; }
  int64_t num_pages() const { return static_cast<int64_t>(ref_counts_.size()); }

 private:
  void require_in_pool(int64_t page) const;
  void require_held(int32_t page) const;

  std::vector<int32_t> ref_counts_;
  std::vector<uint64_t> free_bits_;  // one bit a page, set while it is free
  int64_t first_word_ = 0;           // no word before this one has a bit set
  int64_t num_free_;
};

}  // namespace sip
