// Views of memory that the caller owns: no copies, no ownership, no bounds checks.
#pragma once

#include <cstdint>

namespace sip {

template <class T>
struct Span {
  T* data;
  int64_t size;

  T& operator[](int64_t index) const { return data[index]; }
  T* begin() const { return data; }
  T* end() const { return data + size; }
};

// A row-major matrix; table[row][col].
template <class T>
struct Table {
  T* data;
  int64_t rows;
  int64_t cols;

  T* operator[](int64_t row) const { return data + row * cols; }
};

}  // namespace sip
