// Host plan of the paged KV cache: page counts, block tables, slots, and the variable-length decode step.
#include "wave_planner.h"

#include <algorithm>
#include <string>
#include <vector>

namespace sip {

namespace {

constexpr int32_t kNoPage = -1;
constexpr int64_t kNoSlot = -1;

// Divides positions by the page size: a shift for powers of two, which is what kernels like.
class Paging {
 public:
  explicit Paging(int32_t page_size) : page_size_(page_size) {
    while ((1 << shift_) < page_size && shift_ < 30) ++shift_;
    is_power_ = (1 << shift_) == page_size;
  }
  int32_t block(int32_t position) const { return is_power_ ? position >> shift_ : position / page_size_; }
  int64_t slot(int32_t page, int32_t block, int32_t position) const {
    return (int64_t{page} - block) * page_size_ + position;
  }

 private:
  int32_t page_size_;
  int shift_ = 0;
  bool is_power_;
};

int64_t num_blocks(int64_t tokens, int64_t page_size) { return (tokens + page_size - 1) / page_size; }

std::string entry(const char* name, int64_t index, int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value);
}

void require_at_least(const char* name, int64_t value, int64_t least) {
  if (value >= least) return;
  throw PageError(std::string(name) + " is " + std::to_string(value) + ": it must be at least " +
                  std::to_string(least));
}

void require_all_at_least(const char* name, Span<const int32_t> values, int32_t least) {
  for (int64_t i = 0; i < values.size; ++i) {
    if (values[i] >= least) continue;
    throw PageError(entry(name, i, values[i]) + ": it must be at least " + std::to_string(least));
  }
}

void require_size(const char* name, int64_t size, int64_t expected) {
  if (size == expected) return;
  throw PageError(std::string(name) + " has " + std::to_string(size) + " entries: it must have " +
                  std::to_string(expected));
}

void require_width(int64_t blocks, int64_t cols) {
  if (blocks <= cols) return;
  throw PageError("a row needs " + std::to_string(blocks) + " pages but the block table has " +
                  std::to_string(cols) + " columns: make it wider");
}

void check_groups(Span<const int32_t> prefix_lens, Span<const int32_t> num_rollouts, int64_t suffix_tokens,
                  int32_t page_size) {
  require_at_least("page_size", page_size, 1);
  require_at_least("suffix_tokens", suffix_tokens, 0);
  require_size("num_rollouts", num_rollouts.size, prefix_lens.size);
  require_all_at_least("prefix_lens", prefix_lens, 0);
  require_all_at_least("num_rollouts", num_rollouts, 1);
}

[[noreturn]] void throw_no_page(int64_t row, int64_t position, int64_t cols, int32_t page_size) {
  throw PageError("row " + std::to_string(row) + " has no page for position " + std::to_string(position) +
                  ": its table holds at most " + std::to_string(cols) + " pages of " +
                  std::to_string(page_size) + " tokens");
}

void fill_row(const int32_t* pages, int64_t count, int32_t* row, int64_t cols) {
  std::fill(std::copy_n(pages, count, row), row + cols, kNoPage);
}

}  // namespace

int64_t num_wave_pages(Span<const int32_t> prefix_lens, Span<const int32_t> num_rollouts, int64_t suffix_tokens,
                       int32_t page_size) {
  check_groups(prefix_lens, num_rollouts, suffix_tokens, page_size);
  const int64_t suffix_blocks = num_blocks(suffix_tokens, page_size);
  int64_t pages = 0;
  for (int64_t group = 0; group < prefix_lens.size; ++group) {
    pages += num_blocks(prefix_lens[group], page_size) + num_rollouts[group] * suffix_blocks;
  }
  return pages;
}

void fill_prefix_tables(Span<const int32_t> pages, Span<const int32_t> prefix_lens, int32_t page_size,
                        Table<int32_t> tables) {
  require_at_least("page_size", page_size, 1);
  require_size("prefix_lens", prefix_lens.size, tables.rows);
  require_all_at_least("prefix_lens", prefix_lens, 0);
  int64_t needed = 0;
  for (int32_t length : prefix_lens) {
    require_width(num_blocks(length, page_size), tables.cols);
    needed += num_blocks(length, page_size);
  }
  require_size("pages", pages.size, needed);
  const int32_t* next = pages.data;
  for (int64_t row = 0; row < tables.rows; ++row) {
    const int64_t blocks = num_blocks(prefix_lens[row], page_size);
    fill_row(next, blocks, tables[row], tables.cols);
    next += blocks;
  }
}

void fill_suffix_tables(Span<const int32_t> pages, int64_t suffix_tokens, int32_t page_size,
                        Table<int32_t> tables) {
  require_at_least("page_size", page_size, 1);
  require_at_least("suffix_tokens", suffix_tokens, 0);
  const int64_t blocks = num_blocks(suffix_tokens, page_size);
  if (tables.rows > 0) require_width(blocks, tables.cols);
  require_size("pages", pages.size, tables.rows * blocks);
  for (int64_t row = 0; row < tables.rows; ++row) {
    fill_row(pages.data + row * blocks, blocks, tables[row], tables.cols);
  }
}

void fill_slots(Table<const int32_t> tables, Span<const int32_t> lens, int32_t page_size, Span<int64_t> slots) {
  require_at_least("page_size", page_size, 1);
  require_size("lens", lens.size, tables.rows);
  require_size("slots", slots.size, tables.rows);
  const Paging paging(page_size);
  for (int64_t row = 0; row < tables.rows; ++row) {
    const int32_t block = paging.block(lens[row]);
    if (lens[row] < 0 || block >= tables.cols || tables[row][block] < 0) {
      throw_no_page(row, lens[row], tables.cols, page_size);
    }
    slots[row] = paging.slot(tables[row][block], block, lens[row]);
  }
}

void fill_prefill_slots(Table<const int32_t> tables, Span<const int32_t> starts, Span<const int32_t> lens,
                        int32_t page_size, Span<int64_t> slots) {
  require_at_least("page_size", page_size, 1);
  require_size("starts", starts.size, tables.rows);
  require_size("lens", lens.size, tables.rows);
  require_all_at_least("starts", starts, 0);
  require_all_at_least("lens", lens, 0);
  int64_t tokens = 0;
  for (int32_t length : lens) tokens += length;
  require_size("slots", slots.size, tokens);
  int64_t* slot = slots.data;
  for (int64_t row = 0; row < tables.rows; ++row) {
    const int64_t end = int64_t{starts[row]} + lens[row];
    for (int64_t position = starts[row]; position < end;) {
      const int64_t block = position / page_size;
      if (block >= tables.cols || tables[row][block] < 0) throw_no_page(row, position, tables.cols, page_size);
      const int64_t shift = (tables[row][block] - block) * page_size;  // from positions to slots
      const int64_t block_end = std::min(end, (block + 1) * page_size);
      while (position < block_end) *slot++ = shift + position++;
    }
  }
}

namespace {

// Suffix and prefix pages of the finished rows, with one entry for each reference they hold.
std::vector<int32_t> pages_of_finished(const LiveRows& rows, int64_t num_live) {
  std::vector<int32_t> pages;
  const auto append = [&pages](const int32_t* row, int64_t cols) {
    std::copy_if(row, row + cols, std::back_inserter(pages), [](int32_t page) { return page >= 0; });
  };
  for (int64_t row = 0; row < num_live; ++row) {
    if (!rows.finished[row]) continue;
    const int32_t group = rows.group_of_sequence[row];
    if (group < 0 || group >= rows.prefix_tables.rows) {
      throw PageError(entry("group_of_sequence", row, group) + ": there are " +
                      std::to_string(rows.prefix_tables.rows) + " prefix rows");
    }
    append(rows.suffix_tables[row], rows.suffix_tables.cols);
    append(rows.prefix_tables[group], rows.prefix_tables.cols);
  }
  return pages;
}

// How many unfinished rows start a new page with their next token.
int64_t num_pages_needed(const LiveRows& rows, int64_t num_live, int32_t page_size) {
  const Paging paging(page_size);
  int64_t needed = 0;
  for (int64_t row = 0; row < num_live; ++row) {
    if (rows.finished[row]) continue;
    const int32_t length = rows.suffix_lens[row];
    const int32_t block = paging.block(length);
    if (length < 0 || block >= rows.suffix_tables.cols) {
      throw_no_page(row, length, rows.suffix_tables.cols, page_size);
    }
    needed += rows.suffix_tables[row][block] < 0;
  }
  return needed;
}

// Moves rows first .. last - 1 down to `kept`.
void move_rows(const LiveRows& rows, int64_t first, int64_t last, int64_t kept) {
  for (int64_t row = first; row < last; ++row) rows.source_rows[kept + row - first] = static_cast<int32_t>(row);
  if (kept == first) return;
  std::copy(rows.suffix_tables[first], rows.suffix_tables[last], rows.suffix_tables[kept]);
  const auto move = [=](auto values) { std::copy(&values[first], &values[last], &values[kept]); };
  move(rows.group_of_sequence);
  move(rows.suffix_lens);
}

// Moves unfinished rows to the front, keeping their order: the rollouts of a group stay neighbours.
int64_t compact(const LiveRows& rows, int64_t num_live) {
  int64_t kept = 0;
  const bool* const end = rows.finished.data + num_live;
  for (const bool* first = rows.finished.data; first != end;) {
    first = std::find(first, end, false);
    const bool* last = std::find(first, end, true);
    move_rows(rows, first - rows.finished.data, last - rows.finished.data, kept);
    kept += last - first;
    first = last;
  }
  std::fill(rows.suffix_tables[kept], rows.suffix_tables[num_live], kNoPage);
  std::fill(rows.group_of_sequence.data + kept, rows.group_of_sequence.data + num_live, 0);
  std::fill(rows.suffix_lens.data + kept, rows.suffix_lens.data + num_live, 0);
  std::fill(rows.slots.data + kept, rows.slots.data + num_live, kNoSlot);
  std::fill_n(rows.finished.data, num_live, false);
  return kept;
}

void advance(const LiveRows& rows, int64_t num_live, int32_t page_size, const std::vector<int32_t>& new_pages) {
  const Paging paging(page_size);
  auto new_page = new_pages.begin();
  for (int64_t row = 0; row < num_live; ++row) {
    const int32_t length = rows.suffix_lens[row]++;
    const int32_t block = paging.block(length);
    int32_t& page = rows.suffix_tables[row][block];
    if (page < 0) page = *new_page++;
    rows.slots[row] = paging.slot(page, block, length);
  }
}

void check_live_rows(const LiveRows& rows, int64_t num_live, int32_t page_size) {
  require_at_least("page_size", page_size, 1);
  const int64_t capacity = rows.suffix_tables.rows;
  require_size("group_of_sequence", rows.group_of_sequence.size, capacity);
  require_size("suffix_lens", rows.suffix_lens.size, capacity);
  require_size("finished", rows.finished.size, capacity);
  require_size("slots", rows.slots.size, capacity);
  require_size("source_rows", rows.source_rows.size, capacity);
  if (num_live >= 0 && num_live <= capacity) return;
  throw PageError("num_live is " + std::to_string(num_live) + ": the tables have " + std::to_string(capacity) +
                  " rows");
}

}  // namespace

StepResult step(PageAllocator& allocator, const LiveRows& rows, int64_t num_live, int32_t page_size) {
  check_live_rows(rows, num_live, page_size);
  const std::vector<int32_t> returned = pages_of_finished(rows, num_live);
  const int64_t needed = num_pages_needed(rows, num_live, page_size);
  allocator.release({returned.data(), static_cast<int64_t>(returned.size())});
  num_live = compact(rows, num_live);
  if (needed > allocator.num_free()) return {num_live, needed - allocator.num_free()};
  advance(rows, num_live, page_size, allocator.allocate(needed));
  return {num_live, 0};
}

}  // namespace sip
