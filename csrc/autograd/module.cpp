// The Python module of this library: what a call of the head passes through on its way to the operators. In C++, as
// what the interpreter reads for itself costs a small call most where other programs' data filled the caches.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "head.h"

namespace rebalfer {
namespace {

// What rebalfer_kernels/signatures.py says of the arguments of a call. Every value begins with its kind, and with its
// size where that varies, so that different arguments never have the same description.
class Description {
 public:
  explicit Description(int64_t tensors) { words_.push_back(tensors); }

  // False where the value is none of those that can be described.
  bool tensor(PyObject* value) {
    if (value == Py_None) return put(kNone, 0);
    if (!THPVariable_CheckExact(value)) return false;
    const Tensor& t = THPVariable_Unpack(value);
    if (t.layout() != at::kStrided || t.is_nested()) return false;
    const c10::Device device = t.device();
    const auto sizes = t.sizes(), strides = t.strides();
    put(kTensor, sizes.size());
    words_.push_back(int64_t(t.scalar_type()) << 32 | int64_t(device.type()) << 16 | int64_t(t.requires_grad()));
    words_.push_back(device.index());
    words_.append(sizes.begin(), sizes.end());
    words_.append(strides.begin(), strides.end());
    return true;
  }

  bool option(PyObject* value) {
    if (value == Py_None) return put(kNone, 0);
    if (PyBool_Check(value)) return put(kBool, value == Py_True);
    if (PyLong_CheckExact(value)) {
      int overflow = 0;
      put(kInt, 0);
      words_.push_back(PyLong_AsLongLongAndOverflow(value, &overflow));
      return !overflow;
    }
    if (PyUnicode_CheckExact(value)) {
      Py_ssize_t size = 0;
      const char* const text = PyUnicode_AsUTF8AndSize(value, &size);
      if (!text) PyErr_Clear();  // half a surrogate pair
      return text && bytes(kStr, text, size);
    }
    return PyBytes_CheckExact(value) && bytes(kBytes, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
  }

  PyObject* get() const {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_.data()), words_.size() * sizeof(int64_t));
  }

 private:
  enum Kind { kNone, kBool, kInt, kStr, kBytes, kTensor };

  bool put(Kind kind, int64_t size) {
    words_.push_back(kind + 16 * size);
    return true;
  }

  bool bytes(Kind kind, const char* from, int64_t size) {
    put(kind, size);
    const size_t begin = words_.size();
    words_.resize(begin + (size + 7) / 8);  // zeros
    std::memcpy(words_.data() + begin, from, size);
    return true;
  }

  c10::SmallVector<int64_t, 128> words_;
};

// Whether the arguments say all there is to a call: dispatch.ordinary.
bool ordinary() {
  const c10::DispatchKeySet under_way = c10::impl::tls_local_dispatch_key_set().included_;
  return !under_way.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !under_way.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) && !torch::jit::tracer::isTracing() &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool expect(bool ok, const char* what) {
  if (!ok) PyErr_SetString(PyExc_TypeError, what);
  return ok;
}

PyObject* described(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!expect(count == 3 && PyTuple_CheckExact(arguments[0]) && PyTuple_CheckExact(arguments[1]),
              "described: expected (tensors: tuple, options: tuple, default)"))
    return nullptr;
  if (!ordinary()) Py_RETURN_NONE;
  Description all(PyTuple_GET_SIZE(arguments[0]));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[0]); ++i)
    if (!all.tensor(PyTuple_GET_ITEM(arguments[0], i))) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[1]); ++i)
    if (!all.option(PyTuple_GET_ITEM(arguments[1], i))) Py_RETURN_NONE;
  if (!all.option(arguments[2])) Py_RETURN_NONE;
  return all.get();
  END_HANDLE_TH_ERRORS
}

OptionalTensor optional(PyObject* value) {
  return value == Py_None ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(value));
}

PyObject* head_of(PyObject*, PyObject* const* a, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  bool ok = count == 8 && PyFloat_CheckExact(a[6]) && PyLong_CheckExact(a[7]);
  for (int i = 0; i < 6 && ok; ++i) ok = THPVariable_Check(a[i]) || (a[i] == Py_None && (i == 2 || i == 3 || i == 4));
  if (!expect(ok,
              "head: expected (features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, "
              "target_table: Tensor | None, map_weights: Tensor, consistency_weight: float, options: int)"))
    return nullptr;
  const OptionalTensor bias = optional(a[2]), targets = optional(a[3]), target_table = optional(a[4]);
  const double consistency_weight = PyFloat_AS_DOUBLE(a[6]);
  const int64_t options = PyLong_AsLongLong(a[7]);
  if (PyErr_Occurred()) return nullptr;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> out;
  try {
    const pybind11::gil_scoped_release no_gil;
    out = head(THPVariable_Unpack(a[0]), THPVariable_Unpack(a[1]), bias, targets, target_table,
               THPVariable_Unpack(a[5]), consistency_weight, options);
  } catch (const std::out_of_range& error) {  // a class; PyTorch 2.11 would make it a RuntimeError
    PyErr_SetString(PyExc_IndexError, error.what());
    return nullptr;
  }
  auto& [loss, classification, consistency, logits, maps] = out;
  Tensor* const tensors[] = {&loss, &classification, &consistency, &logits, &maps};
  auto result = pybind11::reinterpret_steal<pybind11::object>(PyTuple_New(5));
  for (int i = 0; i < 5 && result; ++i) {
    PyObject* const wrapped = THPVariable_Wrap(std::move(*tensors[i]));
    if (!wrapped) return nullptr;
    PyTuple_SET_ITEM(result.ptr(), i, wrapped);
  }
  return result.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* backend_number_of(PyObject*, PyObject* name) {
  HANDLE_TH_ERRORS
  const char* const text = PyUnicode_AsUTF8(name);
  return text ? PyLong_FromLongLong(backend_number(text)) : nullptr;
  END_HANDLE_TH_ERRORS
}

// The form of a function whose arguments Python passes as an array.
PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"described", fast(described), METH_FASTCALL,
     "described(tensors, options, default): bytes, or None where the call must be decided anew."},
    {"head", fast(head_of), METH_FASTCALL,
     "head(features, weight, bias, targets, target_table, map_weights, consistency_weight, options): loss, "
     "classification, consistency, logits and, if they are wanted, maps, recorded."},
    {"backend_number", backend_number_of, METH_O, "backend_number(name): a backend as a part of options."},
    {}};

PyModuleDef_Slot slots[] = {
#if defined(Py_GIL_DISABLED)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "autograd", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace rebalfer

PyMODINIT_FUNC PyInit_autograd() { return PyModuleDef_Init(&rebalfer::module); }
