// Reference-counted pages: a bitmap of free pages and a count for each page.
#include "page_allocator.h"

#include <algorithm>
#include <limits>

namespace sip {

namespace {

constexpr int64_t kBits = 64;

// Page numbers are int32.
int64_t checked_pool_size(int64_t num_pages) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  if (num_pages < 1 || num_pages > limit) {
    throw PageError("num_pages is " + std::to_string(num_pages) + ": a pool has 1 to " +
                    std::to_string(limit) + " pages");
  }
  return num_pages;
}

}  // namespace

PageAllocator::PageAllocator(int64_t num_pages)
    : ref_counts_(checked_pool_size(num_pages), 0),
      free_bits_((num_pages + kBits - 1) / kBits, ~uint64_t{0}),
      num_free_(num_pages) {
  if (num_pages % kBits != 0) free_bits_.back() = (uint64_t{1} << (num_pages % kBits)) - 1;
}

std::vector<int32_t> PageAllocator::allocate(int64_t count) {
  if (count < 0) throw PageError("cannot allocate " + std::to_string(count) + " pages: ask for 0 or more");
  if (count > num_free_) throw OutOfPages(count, num_free_);
  std::vector<int32_t> pages(count);
  for (int32_t& page : pages) {
    while (free_bits_[first_word_] == 0) ++first_word_;
    uint64_t& word = free_bits_[first_word_];
    page = static_cast<int32_t>(first_word_ * kBits + __builtin_ctzll(word));
    word &= word - 1;  // clears the lowest set bit
    ref_counts_[page] = 1;
  }
  num_free_ -= count;
  return pages;
}

void PageAllocator::retain(Span<const int32_t> pages) {
  for (int32_t page : pages) require_held(page);
  for (int32_t page : pages) ++ref_counts_[page];
}

void PageAllocator::release(Span<const int32_t> pages) {
  int64_t dropped = 0;
  try {
    for (; dropped < pages.size; ++dropped) {
      require_held(pages[dropped]);
      --ref_counts_[pages[dropped]];
    }
  } catch (const PageError&) {
    while (dropped > 0) ++ref_counts_[pages[--dropped]];
    throw;
  }
  for (int32_t page : pages) {
    const int64_t word = page / kBits;
    const uint64_t bit = uint64_t{1} << (page % kBits);
    if (ref_counts_[page] > 0 || (free_bits_[word] & bit) != 0) continue;
    free_bits_[word] |= bit;
    first_word_ = std::min(first_word_, word);
    ++num_free_;
  }
}

int32_t PageAllocator::ref_count(int64_t page) const {
  require_in_pool(page);
  return ref_counts_[page];
}

void PageAllocator::require_in_pool(int64_t page) const {
  if (page >= 0 && page < num_pages()) return;
  throw PageError("page " + std::to_string(page) + " is outside the pool of " + std::to_string(num_pages()) +
                  " pages: pass pages that allocate() returned");
}

void PageAllocator::require_held(int32_t page) const {
  require_in_pool(page);
  if (ref_counts_[page] > 0) return;
  throw PageError("page " + std::to_string(page) + " has no reference left: retain and release held pages only");
}

}  // namespace sip
