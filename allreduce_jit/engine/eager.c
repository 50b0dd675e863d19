/* An eager all-reduce of one launch, in C: what Communicator.all_reduce and engine/prepared.py do together, for tensors like those of
 * an earlier call. Optional: whatever is not as it expects, it leaves to them by returning None, with nothing done.
 *
 * Python's limited API, so that one build serves Python 3.10 and later. No header of torch or CUDA: tensors are asked through their
 * own methods, and the driver's functions come as addresses.
 *
 * Order: checks, then under the engine's lock the stop flag, the stream and the launch. The lock is what makes the arguments of the
 * launch this call's alone: the GIL is given up while the driver works, as its queue may be full until a kernel ends, and another
 * thread's abort() is what ends it. */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* Names of attributes, made once. */
static PyObject *layout_, *is_nested, *stopped, *last;

typedef struct {
    uint64_t *input, *output; /* pointers among the kernel's arguments */
    void **stream;            /* of config */
    void *config, *kernel, *arguments;
} Launch;

typedef struct {
    PyObject *held; /* the tuple that all objects below are borrowed from */
    PyObject *tensor, *strided, *matches, *empty, *data_ptr; /* of tensors */
    PyObject *current_device, *device, *raw_stream;          /* of torch */
    PyObject *engine, *order, *acquire, *release, *failed;
    uint64_t nbytes, no_address;
    const volatile uint32_t *stop; /* not 0: an earlier call did not complete */
    int (*launch)(void *config, void *kernel, void *arguments, void *extra);
    int (*capturing)(void *stream, int *status);
    Launch aligned, unaligned; /* for addresses that are multiples of 16, and for others */
} Call;

static const char NAME[] = "allreduce_jit.engine._eager.Call";

/* Whether `result`, which is taken, is `wanted`: 1, 0, or -1 with an exception. */
static int is(PyObject *result, PyObject *wanted) {
    if (!result) return -1;
    Py_DECREF(result);
    return result == wanted;
}

/* Whether a tensor is like those of the earlier call: prepared checks of torch's, of plain tensors only (inputs.plain). */
static int fits(const Call *c, PyObject *x) {
    int yes;
    if ((PyObject *)Py_TYPE(x) != c->tensor) return 0;
    if ((yes = is(PyObject_GetAttr(x, layout_), c->strided)) != 1) return yes;
    if ((yes = is(PyObject_GetAttr(x, is_nested), Py_False)) != 1) return yes;
    return is(PyObject_CallFunctionObjArgs(c->matches, x, NULL), Py_True);
}

/* The unsigned value of a Python int, which is taken; UINT64_MAX with an exception. */
static uint64_t number(PyObject *value) {
    if (!value) return UINT64_MAX;
    uint64_t n = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return n;
}

/* Under the lock: 1 launched, 0 not for us, -1 exception. */
static int launch(const Call *c, uint64_t input, uint64_t output, uint64_t stream) {
    int yes, status = 0, error;
    if ((yes = is(PyObject_GetAttr(c->engine, stopped), Py_False)) != 1) return yes;
    if (*c->stop) return 0;
    PyObject *before = PyObject_GetAttr(c->order, last); /* the stream of the last call; None: it has to be ordered */
    if (!before || before == Py_None) {
        Py_XDECREF(before);
        return before ? 0 : -1;
    }
    const uint64_t known = number(before);
    if (PyErr_Occurred()) return -1;
    if (known != stream) return 0;
    /* The default stream is never captured. */
    if (stream && (c->capturing((void *)stream, &status) || status)) return 0;
    const Launch *l = (input | output) % 16 ? &c->unaligned : &c->aligned;
    *l->input = input;
    *l->output = output;
    *l->stream = (void *)stream;
    Py_BEGIN_ALLOW_THREADS
    error = c->launch(l->config, l->kernel, l->arguments, NULL);
    Py_END_ALLOW_THREADS
    if (!error) return 1;
    PyObject *code = PyLong_FromLong(error), *raised = code ? PyObject_CallFunctionObjArgs(c->failed, code, NULL) : NULL;
    Py_XDECREF(code);
    Py_XDECREF(raised);
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_SystemError, "a failed launch raised nothing");
    return -1;
}

/* (x, out or None) -> out, or a new tensor; None: not for us, nothing was done. */
static PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    const Call *c = PyCapsule_GetPointer(self, NAME);
    if (!c) return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "an eager call takes two arguments: x, and out or None");
        return NULL;
    }
    PyObject *x = args[0], *out = args[1];
    PyObject *device = PyObject_CallNoArgs(c->current_device);
    if (!device) return NULL;
    int yes = PyObject_RichCompareBool(device, c->device, Py_EQ);
    Py_DECREF(device);
    if (yes == 1) yes = fits(c, x);
    if (yes == 1 && out != Py_None && out != x) yes = fits(c, out);
    if (yes != 1) goto refused;

    const uint64_t input = number(PyObject_CallFunctionObjArgs(c->data_ptr, x, NULL));
    if (PyErr_Occurred()) return NULL;
    const uint64_t stream = number(PyObject_CallFunctionObjArgs(c->raw_stream, c->device, NULL));
    if (PyErr_Occurred()) return NULL;
    if (out == Py_None) {
        out = PyObject_CallNoArgs(c->empty);
        if (!out) return NULL;
    } else {
        Py_INCREF(out);
    }
    const uint64_t output = out == x ? input : number(PyObject_CallFunctionObjArgs(c->data_ptr, out, NULL));
    if (PyErr_Occurred()) goto failed;
    const uint64_t apart = input < output ? output - input : input - output;
    if (input < c->no_address || output < c->no_address || (out != x && apart < c->nbytes)) {
        yes = 0;
    } else {
        PyObject *held = PyObject_CallNoArgs(c->acquire);
        if (!held) goto failed;
        Py_DECREF(held);
        yes = launch(c, input, output, stream);
        PyObject *type, *value, *trace; /* what was raised outlives the release */
        PyErr_Fetch(&type, &value, &trace);
        PyObject *left = PyObject_CallNoArgs(c->release);
        Py_XDECREF(left);
        if (type) PyErr_Restore(type, value, trace);
        if (!left) yes = -1;
    }
    if (yes == 1) return out;
failed:
    Py_DECREF(out);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
refused:
    if (yes < 0) return NULL;
    Py_RETURN_NONE;
}

static void dropped(PyObject *self) {
    Call *c = PyCapsule_GetPointer(self, NAME);
    if (!c) return;
    Py_DECREF(c->held);
    PyMem_Free(c);
}

static PyMethodDef CALL = {"eager_call", (PyCFunction)(void (*)(void))call, METH_FASTCALL,
                           "(x, out or None) -> out, or a new tensor; None: left to the caller, nothing was done."};

static int launch_of(PyObject *addresses, Launch *l) {
    unsigned long long a[6];
    if (!PyArg_ParseTuple(addresses, "KKKKKK", a, a + 1, a + 2, a + 3, a + 4, a + 5)) return 0;
    *l = (Launch){(uint64_t *)a[0], (uint64_t *)a[1], (void **)a[2], (void *)a[3], (void *)a[4], (void *)a[5]};
    return 1;
}

static PyObject *make(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *aligned, *unaligned, *keep;
    unsigned long long nbytes, no_address, stop, launch_at, capturing_at;
    Call *c = PyMem_Calloc(1, sizeof *c);
    if (!c) return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOOOOKKKKKO!O!O", &c->tensor, &c->strided, &c->matches, &c->empty, &c->data_ptr,
                          &c->current_device, &c->device, &c->raw_stream, &c->engine, &c->order, &c->acquire, &c->release, &c->failed,
                          &nbytes, &no_address, &stop, &launch_at, &capturing_at, &PyTuple_Type, &aligned, &PyTuple_Type, &unaligned,
                          &keep) ||
        !launch_of(aligned, &c->aligned) || !launch_of(unaligned, &c->unaligned)) {
        PyMem_Free(c);
        return NULL;
    }
    c->nbytes = nbytes;
    c->no_address = no_address;
    c->stop = (const volatile uint32_t *)stop;
    c->launch = (int (*)(void *, void *, void *, void *))launch_at;
    c->capturing = (int (*)(void *, int *))capturing_at;
    PyObject *self = PyCapsule_New(c, NAME, dropped);
    if (!self) {
        PyMem_Free(c);
        return NULL;
    }
    Py_INCREF(args);
    c->held = args;
    PyObject *function = PyCFunction_NewEx(&CALL, self, NULL);
    Py_DECREF(self);
    return function;
}

static PyMethodDef FUNCTIONS[] = {
    {"make", make, METH_VARARGS, "An eager call; eager.py says of what."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_eager", NULL, -1, FUNCTIONS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__eager(void) {
    layout_ = PyUnicode_InternFromString("layout");
    is_nested = PyUnicode_InternFromString("is_nested");
    stopped = PyUnicode_InternFromString("_stopped");
    last = PyUnicode_InternFromString("last");
    if (!layout_ || !is_nested || !stopped || !last) return NULL;
    return PyModule_Create(&MODULE);
}
