// Host plan of the paged KV cache: which groups fit, block tables, and the slots that tokens are written to.
//
// A block table row lists the pages of one prefix or one suffix, padded with -1. The slot of position p is
// row[p / page_size] * page_size + p % page_size. All functions throw PageError on bad input.
#pragma once

#include <cstdint>

#include "page_allocator.h"
#include "views.h"

namespace sip {

// sum over groups of ceil(prefix / page_size), plus sequences * ceil(suffix_tokens / page_size).
int64_t num_wave_pages(Span<const int32_t> prefix_lens, Span<const int32_t> num_rollouts, int64_t suffix_tokens,
                       int32_t page_size);

// Deals `pages` to the rows in order: ceil(prefix_lens[row] / page_size) each, all of them used.
void fill_prefix_tables(Span<const int32_t> pages, Span<const int32_t> prefix_lens, int32_t page_size,
                        Table<int32_t> tables);

// The same with one length for every row.
void fill_suffix_tables(Span<const int32_t> pages, int64_t suffix_tokens, int32_t page_size,
                        Table<int32_t> tables);

// The slot of position lens[row] of every row: where the next token goes.
void fill_slots(Table<const int32_t> tables, Span<const int32_t> lens, int32_t page_size, Span<int64_t> slots);

// The slots of positions starts[row] .. starts[row] + lens[row] - 1, row after row without gaps.
void fill_prefill_slots(Table<const int32_t> tables, Span<const int32_t> starts, Span<const int32_t> lens,
                        int32_t page_size, Span<int64_t> slots);

// Live sequences of varying length in rows 0 .. num_live - 1; every buffer has room for more.
struct LiveRows {
  Table<const int32_t> prefix_tables;  // a row for each group
  Table<int32_t> suffix_tables;
  Span<int32_t> group_of_sequence;
  Span<int32_t> suffix_lens;
  Span<bool> finished;
  Span<int64_t> slots;        // out: where the next token of each row goes
  Span<int32_t> source_rows;  // out: the row that each row had before
};

struct StepResult {
  int64_t num_live;
  int64_t num_short;  // pages missing; if not 0, no length has advanced
};

// One decode step. Finished rows give back their suffix pages and one reference on each page of their prefix;
// the others close ranks in order; then every row gets a slot (and a page where it needs one) for its next
// token and grows by it. If pages are short, only the first half happens: the caller flags rows to preempt
// and calls again. Clears the flags it has used.
StepResult step(PageAllocator& allocator, const LiveRows& rows, int64_t num_live, int32_t page_size);

}  // namespace sip
