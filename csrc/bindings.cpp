// The Python face of the page allocator and the wave planner: checks every buffer, copies none.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "page_allocator.h"
#include "views.h"
#include "wave_planner.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

using Input = const py::object&;

std::string describe(Input object) {
  if (!py::isinstance<py::array>(object)) return py::str(py::type::of(object).attr("__name__"));
  const auto array = py::reinterpret_borrow<py::array>(object);
  std::string text = std::to_string(array.ndim()) + "-d " + std::string(py::str(array.dtype()));
  if (!(array.flags() & py::array::c_style)) text += ", not contiguous";
  if (!array.writeable()) text += ", read-only";
  return text;
}

// The array behind `object`, if it can be used in place as `T` (const: for reading only).
template <class T>
py::array require_array(Input object, const char* name, int ndim) {
  using Value = std::remove_const_t<T>;
  constexpr bool writes = !std::is_const_v<T>;
  if (py::isinstance<py::array_t<Value, py::array::c_style>>(object)) {
    auto array = py::reinterpret_borrow<py::array>(object);
    if (array.ndim() == ndim && (!writes || array.writeable())) return array;
  }
  throw sip::PageError(std::string(name) + " must be a " + (writes ? "writable " : "") + "contiguous " +
                       std::to_string(ndim) + "-d " + std::string(py::str(py::dtype::of<Value>())) +
                       " array, got " + describe(object));
}

// The caller's argument keeps the memory alive for the length of the call.
template <class T>
sip::Span<T> span(Input object, const char* name) {
  const py::array array = require_array<T>(object, name, 1);
  return {static_cast<T*>(const_cast<void*>(array.data())), array.shape(0)};
}

template <class T>
sip::Table<T> table(Input object, const char* name) {
  const py::array array = require_array<T>(object, name, 2);
  return {static_cast<T*>(const_cast<void*>(array.data())), array.shape(0), array.shape(1)};
}

py::array_t<int32_t> to_numpy(const std::vector<int32_t>& pages) {
  return py::array_t<int32_t>(static_cast<py::ssize_t>(pages.size()), pages.data());
}

// The exception classes live in Python, where the twin raises them too.
template <class... Args>
void raise(const char* type, Args&&... args) {
  const py::object error = py::module_::import("sip_engine.sampler.pages").attr(type);
  PyErr_SetObject(error.ptr(), error(std::forward<Args>(args)...).ptr());
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const sip::OutOfPages& error) {
    raise("OutOfPages", error.asked, error.free);
  } catch (const sip::PageError& error) {
    raise("PageError", error.what());
  }
}

void bind_allocator(py::module_& module) {
  using sip::PageAllocator;
  py::class_<PageAllocator>(module, "PageAllocator", "Reference-counted pages, lowest free number first.")
      .def(py::init<int64_t>(), "num_pages"_a)
      .def(
          "allocate",
          [](PageAllocator& self, int64_t count) { return to_numpy(self.allocate(count)); }, "count"_a)
      .def(
          "retain",
          [](PageAllocator& self, Input pages) { self.retain(span<const int32_t>(pages, "pages")); }, "pages"_a)
      .def(
          "release",
          [](PageAllocator& self, Input pages) { self.release(span<const int32_t>(pages, "pages")); },
          "pages"_a)
      .def("ref_count", &PageAllocator::ref_count, "page"_a)
      .def_property_readonly("num_free", &PageAllocator::num_free)
      .def_property_readonly("num_used", &PageAllocator::num_used)
      .def_property_readonly("num_pages", &PageAllocator::num_pages);
}

int64_t num_wave_pages(Input prefix_lens, Input num_rollouts, int64_t suffix_tokens, int32_t page_size) {
  return sip::num_wave_pages(span<const int32_t>(prefix_lens, "prefix_lens"),
                             span<const int32_t>(num_rollouts, "num_rollouts"), suffix_tokens, page_size);
}

void fill_prefix_tables(Input pages, Input prefix_lens, int32_t page_size, Input tables) {
  sip::fill_prefix_tables(span<const int32_t>(pages, "pages"), span<const int32_t>(prefix_lens, "prefix_lens"),
                          page_size, table<int32_t>(tables, "tables"));
}

void fill_suffix_tables(Input pages, int64_t suffix_tokens, int32_t page_size, Input tables) {
  sip::fill_suffix_tables(span<const int32_t>(pages, "pages"), suffix_tokens, page_size,
                          table<int32_t>(tables, "tables"));
}

void fill_slots(Input tables, Input lens, int32_t page_size, Input slots) {
  sip::fill_slots(table<const int32_t>(tables, "tables"), span<const int32_t>(lens, "lens"), page_size,
                  span<int64_t>(slots, "slots"));
}

void fill_prefill_slots(Input tables, Input starts, Input lens, int32_t page_size, Input slots) {
  sip::fill_prefill_slots(table<const int32_t>(tables, "tables"), span<const int32_t>(starts, "starts"),
                          span<const int32_t>(lens, "lens"), page_size, span<int64_t>(slots, "slots"));
}

std::pair<int64_t, int64_t> step(sip::PageAllocator& allocator, Input prefix_tables, Input suffix_tables,
                                 Input group_of_sequence, Input suffix_lens, Input finished, int64_t num_live,
                                 int32_t page_size, Input slots, Input source_rows) {
  const sip::LiveRows rows{table<const int32_t>(prefix_tables, "prefix_tables"),
                           table<int32_t>(suffix_tables, "suffix_tables"),
                           span<int32_t>(group_of_sequence, "group_of_sequence"),
                           span<int32_t>(suffix_lens, "suffix_lens"),
                           span<bool>(finished, "finished"),
                           span<int64_t>(slots, "slots"),
                           span<int32_t>(source_rows, "source_rows")};
  const sip::StepResult result = sip::step(allocator, rows, num_live, page_size);
  return {result.num_live, result.num_short};
}

}  // namespace

PYBIND11_MODULE(_csrc, module) {
  module.doc() = "Compiled host parts of the sampler; tests/page_twin.py defines what they compute.";
  py::register_local_exception_translator(&translate);
  bind_allocator(module);
  module.def("num_wave_pages", &num_wave_pages, "prefix_lens"_a, "num_rollouts"_a, "suffix_tokens"_a,
             "page_size"_a);
  module.def("fill_prefix_tables", &fill_prefix_tables, "pages"_a, "prefix_lens"_a, "page_size"_a, "tables"_a);
  module.def("fill_suffix_tables", &fill_suffix_tables, "pages"_a, "suffix_tokens"_a, "page_size"_a,
             "tables"_a);
  module.def("fill_slots", &fill_slots, "tables"_a, "lens"_a, "page_size"_a, "slots"_a);
  module.def("fill_prefill_slots", &fill_prefill_slots, "tables"_a, "starts"_a, "lens"_a, "page_size"_a,
             "slots"_a);
  module.def("step", &step, "allocator"_a, "prefix_tables"_a, "suffix_tables"_a, "group_of_sequence"_a,
             "suffix_lens"_a, "finished"_a, "num_live"_a, "page_size"_a, "slots"_a, "source_rows"_a);
}
