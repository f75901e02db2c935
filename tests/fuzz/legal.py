"""Which values of values.py are no mistake after all, for which argument of which call.

Read one by one. What is accepted and not here is reported: it is a mistake that nobody noticed, or
it belongs here.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_FORMS = {
    "strided", "expanded", "requires grad", "a parameter", "negative view", "in inference mode",
}  # fmt: skip
_OTHER_VALUES = {"first huge", "first -1", "all huge"}
_SAMPLES = _FORMS | _OTHER_VALUES
_PLAIN = _SAMPLES | {"first NaN", "first inf", "no samples", "one sample less", "twice"}
_NUMBERS = {"0.5", "1", "2.5", "7"}
_LISTS = {
    "[1, 1]", "[2, 2]", "range", "int tensor", "0-d tensor", "0-d int tensor", "bool tensor",
    "numpy array", "tensor",
}  # fmt: skip
_CONFIGS = {
    "0", "1", "{1}", "set()", "[1, 1]", "bool tensor", "int tensor", "numpy int", "0-d int tensor",
}  # fmt: skip
_OTHER_TASKS = {"'a'", "'c'"}
_NO_CONFIG = _CONFIGS | {"None"}

LEGAL: list[tuple[str, str, set[str]]] = [
    # flags: Python's truth
    ("*", "validate", {"*"}),
    ("*", "redraw_unclaimed", {"*"}),
    ("SkipLayer", "begins", {"*"}),
    ("SkipLayer", "ends", {"*"}),
    ("capture", "strict", {"*"}),
    ("LASEM, approximations", "max_memory", {"None", "0.5", "1", "7", "huge int"}),
    ("LASEM, approximations", "prune", {"0", "0.5"}),
    ("LASEM, approximations", "m_step_draws", {"None", "1", "7", "numpy int", "0-d int tensor"}),
    ("LASEM, approximations", "e_step_every", {"1", "7", "numpy int", "0-d int tensor"}),
    # mini-batches
    ("em*", "x", _SAMPLES),
    ("em.evaluate", "x", {"twice", "one sample less", "first NaN", "first inf"}),
    ("em, tokens", "x", {"strided", "expanded", "one dimension more", "int32", "int64"}),
    ("em*", "y", _FORMS),
    ("em*", "y", {"flat", "int64"}),
    ("em, regression", "y", _SAMPLES | {"float64", "float16", "bfloat16"}),
    ("em*", "posterior", _FORMS | {"None", "float64", "float16", "bfloat16", "flat"}),
    ("backward twice", "x", _SAMPLES),
    ("a captured step*", "x", _SAMPLES),
    ("a captured step*", "y", _FORMS | {"flat", "int64"}),
    ("capture", "x", _SAMPLES | {"no features", "a feature too few", "int64", "complex", "float64",
                                 "one dimension more", "float16", "bfloat16", "int32", "uint8",
                                 "bool", "flat", "first NaN", "first inf"}),
    # the likelihood looks at the values in the first step
    ("capture", "y", _SAMPLES | {"flat", "int64", "int32", "uint8", "bool", "complex", "float64",
                                 "float16", "bfloat16", "first inf", "first NaN"}),
    # a plain forward takes what PyTorch takes
    ("net*", "x", _PLAIN),
    # what users' objects return
    ("* stage that returns", "out", _SAMPLES | {"in inference mode", "twice"}),
    ("evaluate a stage that returns", "out", {"first inf", "first NaN"}),
    ("a head that returns", "out",
     _SAMPLES | {"a feature too few", "float64", "float16", "bfloat16"}),
    ("a likelihood that returns", "*", _SAMPLES | {"float64", "float16", "bfloat16"}),
    ("a likelihood that returns", "reduced", {"flat"}),
    ("a likelihood that returns", "*", {"''", "'a'", "'c'", "'nonsense'", "'\\x00.%'"}),
    ("a prior *", "*", _SAMPLES | {"float64", "float16", "bfloat16", "flat"}),
    ("a prior that chooses by", "score", {"None", "int64", "int32", "uint8", "first inf"}),
    ("a mechanism that returns", "auxiliary",
     _SAMPLES | {"first NaN", "first inf", "float64", "float16", "bfloat16", "None", "0-d tensor",
                 "0-d"}),
    ("a mechanism that returns", "branch", {"''", "'a'", "'c'", "'nonsense'", "'\\x00.%'"}),
    # tasks and configurations
    ("em.*", "task", _OTHER_TASKS),
    ("net.*", "task", _OTHER_TASKS | {"'nonsense'"} - {"'nonsense'"}),
    ("net*", "task", _OTHER_TASKS),
    ("em*", "task", _OTHER_TASKS),
    ("capture", "task", {"'a'"}),
    ("net.add_task", "task", {"'nonsense'", "'\\x00.%'"}),
    ("net.add_task*", "head", {"a module", "an empty module", "a module on meta",
                               "a complex module", "a NaN module"}),
    ("TransferNet*", "stage", {"a module", "an empty module", "a module on meta",
                               "a complex module", "a NaN module"}),
    ("em.end_task", "config", _NO_CONFIG),
    ("net.keep", "config", _CONFIGS),
    ("net", "config", _NO_CONFIG),
    ("net, ended task", "config", _NO_CONFIG),
    ("net.path", "config", _NO_CONFIG),
    ("net.path", "task", {"'c'"}),
    ("*", "space", {"None"}),
    ("LASEM*", "prior", _FORMS | _OTHER_VALUES | {"flat", "float64", "float16", "bfloat16"}),
    ("Fixed", "probabilities", _SAMPLES | {"flat", "float64", "float16", "bfloat16", "twice",
                                           "one sample less", "a feature too few"}),
    ("em.load_state_dict, one value", "value", _FORMS | {"0-d", "0-d tensor", "0-d int tensor"}),
    ("em.load_state_dict, *extra state", "value",
     {"strided", "int64", "int32", "uint8", "flat", "in inference mode"}),
    ("*load_state_dict*", "state", {"{}"}),
    # what is searched
    ("ConfigSpace*", "depth", {"None", "1", "7", "numpy int", "0-d int tensor"}),
    ("ConfigSpace*", "groups", {"None", "[1, 1]"}),
    ("ConfigSpace.from_configs*", "config*",
     _CONFIGS | {"generator", "range", "[1, 1]", "[2, 2]", "{0}"}),
    ("ConfigSpace.*", "value", _CONFIGS | {"-1"}),
    ("a likelihood that returns", "log_prob", {"first NaN", "first inf"}),  # left out: overflow
    # numbers
    ("Gaussian", "sigma", _NUMBERS | {"huge float", "huge int", "numpy int"}),
    ("Count", "initial", _NUMBERS | {"huge float", "huge int", "numpy int"}),
    ("Historic", "initial", _NUMBERS | {"huge float", "huge int", "numpy int"}),
    ("TensorFactorization", "aux_weight", _NUMBERS | {"0", "numpy int", "huge float", "huge int"}),
    ("*", "init", {"None", "lambda", "a class", "a module", "an empty module", "a lazy module",
                   "a module on meta", "a complex module", "a NaN module"}),
    ("DeconvolutionalFactorization", "sizes", {"None", "[]", "()"}),
    ("TFRMSprop", "lr", _NUMBERS | {"0", "huge float", "huge int", "0-d tensor", "0-d int tensor",
                                    "numpy int"}),
    ("TFRMSprop", "decay", {"0", "1", "0.5", "numpy int"}),
    ("TFRMSprop", "eps", _NUMBERS | {"huge float", "huge int", "numpy int"}),
    ("TFRMSprop", "params", _FORMS | {"a parameter", "tensor"}),
    ("TFRMSprop.step", "closure", {"None", "lambda", "a class", "object"}),
    ("release_", "module", {"a module", "an empty module", "a module on meta", "a lazy module",
                            "a NaN module"}),
    ("glorot_uniform_", "tensor", _PLAIN | {"float64", "float16", "bfloat16", "0-d", "0-d tensor",
                                            "flat", "one dimension more", "a feature too few",
                                            "one dimension more in front", "no features", "tensor",
                                            "empty tensor", "on meta", "meta tensor"}),
    ("glorot_uniform_", "fan_*", _NUMBERS | {"0", "huge int", "huge float", "numpy int"}),
    # the paper's networks
    ("nets.*", "width", _NUMBERS | {"numpy int", "huge float", "huge int"}),
    ("nets.*", "layers", {"7"}),
    ("Architecture", "batch_size", {"1", "7", "numpy int"}),
    ("Architecture", "groups", {"None"}),
    ("Architecture", "hidden", {"()", "[]", "[1, 1]", "[2, 2]"}),
    ("Architecture", "skips", {"()", "[]"}),
    ("Architecture.head", "classes", {"1", "7", "numpy int", "0-d int tensor"}),
    ("Architecture.space", "groups", {"None", "[2, 2]"}),
    ("same_pool", "*", {"1", "7", "numpy int", "0-d int tensor", "huge int"}),
    ("SkipLayer", "pool", {"a module", "an empty module", "a lazy module", "a module on meta",
                           "a complex module", "a NaN module"}),
    # runs and measures
    ("train_sequence", "seed", {"0", "1", "7", "-1", "True", "numpy int", "0-d int tensor"}),
    ("train_sequence", "em_options", {"None", "{}"}),
    ("train_sequence", "on_epoch", {"None", "lambda", "a class"}),
    ("train_sequence", "device", {"a device"}),
    ("train_sequence*", "*", {"numpy int"}),
    ("train_sequence", "epochs", {"1", "7"}),
    ("train_sequence", "batch_size", {"1", "7"}),
    ("train_sequence", "evaluate_earlier_every", {"1", "7"}),
    ("train_sequence, data", "x", _SAMPLES),
    ("train_sequence, data", "y", _FORMS | {"flat", "int64"}),
    ("train_sequence, data", "n_classes", {"7"}),
    ("train_sequence, splits", "name", {"'a'", "'c'", "'nonsense'", "'\\x00.%'"}),
    ("metrics.*", "*", _LISTS | _NUMBERS | {"0", "-0.1", "-1", "True", "numpy int", "huge float",
                                            "huge int", "[nan]"}),
]  # fmt: skip


def is_legal(call: str, argument: str, value: str) -> bool:
    """Whether this value of this argument may be accepted."""
    return any(
        fnmatchcase(call, calls) and fnmatchcase(argument, names) and ("*" in good or value in good)
        for calls, names, good in LEGAL
    )
