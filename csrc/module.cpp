// The Python module `sbm_fast._C`. It holds no functions: importing it loads the library, whose
// static initialisers register the ops with torch. Only the stable Python ABI is used, so the
// library serves every Python from 3.10 on.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "build_facts.h"

// _load.py searches the file for this mark: a library of other sources must be refused before it
// is loaded, since an op that is registered cannot be taken back.
static const char kSourceHash[] = "sbm_fast-source-hash:" SBM_SOURCE_HASH;

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", kSourceHash, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
