// The extension module `_cpu`: operator implementations for the CPU key, and queries about this
// machine.
#include <Python.h>

#include "cpu_dispatch.h"
#include "ops.h"
#include "output_pool.h"
#include "scratch.h"
#include "stable_torch.h"

STABLE_TORCH_LIBRARY_IMPL(lasem_fast, CPU, m) {
  m.impl("winograd_level", TORCH_BOX(&lasem_fast::winograd_level));
  m.impl("winograd_level_backward", TORCH_BOX(&lasem_fast::winograd_level_backward));
  m.impl("winograd_level_skip_backward", TORCH_BOX(&lasem_fast::winograd_level_skip_backward));
  m.impl("norm_level", TORCH_BOX(&lasem_fast::norm_level));
  m.impl("norm_level_backward", TORCH_BOX(&lasem_fast::norm_level_backward));
  m.impl("channels_last_linear", TORCH_BOX(&lasem_fast::channels_last_linear));
  m.impl("channels_last_linear_backward", TORCH_BOX(&lasem_fast::channels_last_linear_backward));
  m.impl("posterior_head", TORCH_BOX(&lasem_fast::posterior_head));
  m.impl("posterior_head_backward", TORCH_BOX(&lasem_fast::posterior_head_backward));
}

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(lasem_fast::isa_name()); }

PyObject* isa_reason(PyObject*, PyObject*) {
  return PyUnicode_FromString(lasem_fast::isa_reason());
}

PyObject* force_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  if (!lasem_fast::force_isa(name))
    return PyErr_Format(PyExc_ValueError,
                        "isa must be one this CPU has (avx2, avx512) or '', got %s", name);
  Py_RETURN_NONE;
}

PyObject* clear_scratch(PyObject*, PyObject*) {
  return PyLong_FromSize_t(lasem_fast::clear_scratch() + lasem_fast::clear_output_pool());
}

PyObject* poison_outputs(PyObject*, PyObject* args) {
  int on;
  if (!PyArg_ParseTuple(args, "p", &on)) return nullptr;
  lasem_fast::poison_outputs(on);
  Py_RETURN_NONE;
}

PyObject* force_schedule(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  if (!lasem_fast::force_schedule(name))
    return PyErr_Format(PyExc_ValueError, "schedule must be 'by block', 'by panel' or '', got %s",
                        name);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Instruction set of the float32 kernels, '' where there is none."},
    {"isa_reason", isa_reason, METH_NOARGS, "Why isa() is '', else ''."},
    {"force_isa", force_isa, METH_VARARGS, "Force 'avx2' or 'avx512'; '' restores the default."},
    {"clear_scratch", clear_scratch, METH_NOARGS, "Free idle memory; returns its bytes."},
    {"force_schedule", force_schedule, METH_VARARGS, "Levels 'by block' or 'by panel', for tests."},
    {"poison_outputs", poison_outputs, METH_VARARGS, "Fill new outputs with NaN, for tests."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
