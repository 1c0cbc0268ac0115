"""Names of other libraries that any version of them may change, and the feature that needs each.

Private names, and those around which something of ours runs, are taken from here wherever they are
used. Names that look public and are documented nowhere are used as they are, and listed at the end.
``tests/unit/test_library_internals.py`` looks up all of them in the installed versions, and says
what an update would break.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Library:
    """A library whose internals are used.

    Attributes:
        name: as messages call it.
        package: its distribution and its module.
        oldest: the first version that works.
        tested: the version that all tests run with.
    """

    name: str
    package: str
    oldest: str
    tested: str

    @property
    def is_imported(self) -> bool:
        """Whether the job has imported it."""
        return self.package in sys.modules

    @cached_property
    def installed(self) -> str | None:
        """The installed version; None for a build of another name."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def is_before(self, release: str) -> bool:
        """Whether an earlier version than this is installed; False if that is unknown."""
        return self.installed is not None and _numbers(self.installed) < _numbers(release)


@dataclass(frozen=True)
class Internal:
    """A name that a library may change.

    Attributes:
        library: the library.
        owner: dotted path of the module or class that has the name, or of the class whose objects
            have it; in words, the tensors to which the library attaches it.
        name: the name.
        feature: what does not work without it.
    """

    library: Library
    owner: str
    name: str
    feature: str

    def of(self, owner: Any) -> Any:
        """The attribute of an object.

        Raises:
            RuntimeError: it has none in the installed version.
        """
        missing = object()
        found = getattr(owner, self.name, missing)
        if found is missing:
            kind = getattr(owner, "__name__", type(owner).__name__)
            raise RuntimeError(
                f"{self.library.name}: {kind} has no {self.name} in the installed version, which "
                f"is not supported (tested: {self.library.tested})"
            )
        return found

    def get(self, owner: Any, default: Any = None) -> Any:
        """The attribute of an object that need not have it."""
        return getattr(owner, self.name, default)

    def is_on(self, owner: Any) -> bool:
        """Whether an object has the attribute."""
        return hasattr(owner, self.name)

    def imported(self) -> Any:
        """What a module has under the name; imports the module.

        Raises:
            RuntimeError: it has nothing under the name in the installed version.
        """
        return self.of(pkgutil.resolve_name(self.owner))

    def if_imported(self) -> Any:
        """What a module has under the name; None if the job has not imported the module."""
        return self.get(sys.modules.get(self.owner))


TORCH = Library("torch", "torch", oldest="2.7", tested="2.13.0")
DEEPSPEED = Library("DeepSpeed", "deepspeed", oldest="0.17", tested="0.19.8")
ACCELERATE = Library("accelerate", "accelerate", oldest="1.11", tested="1.15.0")
TRANSFORMERS = Library("transformers", "transformers", oldest="4.47", tested="5.23.0")
LIBRARIES = (TORCH, DEEPSPEED, ACCELERATE, TRANSFORMERS)


def check_versions() -> None:
    """Check that the libraries that the job has imported are not too old.

    Raises:
        RuntimeError: one is.
    """
    for library in LIBRARIES:
        if library.is_imported:
            _check_version(library)


@cache
def _check_version(library: Library) -> None:
    if library.is_before(library.oldest):
        raise RuntimeError(
            f"{library.name} {library.installed} is installed, and arg_dist needs at least "
            f"{library.oldest}: pip install '{library.package}>={library.oldest}'"
        )


def _numbers(release: str) -> list[int]:
    """The leading numbers of a version: 2.13.0+cpu is [2, 13, 0], 1.0rc1 is [1, 0]."""
    return [int(number) for number in re.split(r"[^\d.]", release)[0].split(".") if number]


# -- torch -----------------------------------------------------------------------------------------

_torch = partial(Internal, TORCH)
_optimizer = partial(_torch, "torch.optim.Optimizer")
_join = partial(_torch, "torch.distributed.algorithms.join.Join", feature="join() of DDP")
_groups = partial(_torch, "torch.distributed.distributed_c10d")

# as torch.optim does: it loads the compiler when it is called
DISABLE_DYNAMO = _torch("torch._compile", "_disable_dynamo", "training loops inside torch.compile")
LOAD_PRE_HOOKS = _optimizer("_optimizer_load_state_dict_pre_hooks", "hooks before load_state_dict")
LOAD_POST_HOOKS = _optimizer("_optimizer_load_state_dict_post_hooks", "hooks after load_state_dict")
FUSED_ADAMW = _torch("torch", "_fused_adamw_", "Adam's directions")
FOREACH_NORM = _torch("torch", "_foreach_norm", "norms of gradients on GPUs")
CONVOLUTION = _torch("torch.nn.modules.conv", "_ConvNd", "param_groups: kernels of convolutions")
COMPILED_MODEL = _torch(
    "torch._dynamo.eval_frame.OptimizedModule",
    "_orig_mod",
    "names of parameters under torch.compile",
)
CHECKPOINTED_MODULE = _torch(
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
    "_checkpoint_wrapped_module",
    "names of parameters under activation checkpointing",
)
UNSAVED_BUFFERS = _torch(
    "torch.nn.Module", "_non_persistent_buffers_set", "checkpoint.save: the model's buffers"
)
BACKEND_OF_GROUP = _torch("torch.distributed.ProcessGroup", "_get_backend", "collective_timeout")
BACKEND_TIMEOUT = _torch(
    "torch._C._distributed_c10d.Backend.Options",
    "_timeout",
    "collective_timeout: the process group's own",
)
ALLGATHER_OPTIONS = _torch(
    "torch._C._distributed_c10d", "AllgatherOptions", "collective_timeout of gathers"
)
# torch has no public list of groups
GROUPS = _groups("_world", "Checkpoints of a part of the job's processes; --time-limit")
SET_GROUP_TIMEOUT = _groups("_set_pg_timeout", "--time-limit of the launchers")
AMP_SCALING = _torch(
    "torch.optim.Adam with fused=True",
    "_step_supports_amp_scaling",
    'gradient_sync="sketch": refusal of GradScaler',
)
COLLECTING_STATE = _torch(
    "torch.distributed.checkpoint.state_dict",
    "get_optimizer_state_dict",
    "torch.distributed.checkpoint: state_dict() knows that this module calls it",
)
ZERO_REDUNDANCY = _torch(
    "torch.distributed.optim.zero_redundancy_optimizer",
    "ZeroRedundancyOptimizer",
    "refusal of ZeroRedundancyOptimizer",
)
FLAT_PARAMETER = _torch("a parameter under FSDP1", "_is_flat_param", "refusal of FSDP1")
FLATTENED_PARAMETER = _torch(
    "a parameter under FSDP1 with use_orig_params", "_fsdp_flattened", "refusal of FSDP1"
)
JOIN_BUILT = _join("__init__")
JOIN_EXITED = _join("__exit__")
JOIN_COUNTED = _join("_get_num_nonjoined_procs")
JOIN_GROUP = _join("_process_group")
JOIN_DEVICE = _join("_device")


# arg-dist plan runs the algorithm without data
_unfilled = partial(_torch, feature="arg-dist plan: temporaries")
DISPATCH_MODE = _unfilled("torch.utils._python_dispatch", "TorchDispatchMode")
SCHEMA_OF_OPERATOR = _unfilled("torch.ops.aten.mm.default", "_schema")
ADDRESS_OF_STORAGE = _unfilled("torch.UntypedStorage", "_cdata")
UNSAFE_VIEW = _unfilled("torch.ops.aten", "_unsafe_view")


# -- DeepSpeed -------------------------------------------------------------------------------------

_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_FLAT = "a parameter under ZeRO-1 or 2"
_PARTITIONED = "a parameter under ZeRO-3"

_deepspeed = partial(Internal, DEEPSPEED)
_refused = partial(_deepspeed, feature="refusal of unsupported settings under DeepSpeed")

DEEPSPEED_ENGINE = _deepspeed(
    "deepspeed.runtime.engine", "DeepSpeedEngine", "training with DeepSpeed"
)
ACCEPTED_OPTIMIZERS = _deepspeed(
    "deepspeed.runtime.zero.utils",
    "ZERO_SUPPORTED_OPTIMIZERS",
    "ZeRO without zero_allow_untested_optimizer",
)
OPTIMIZER_CHECK = _deepspeed(
    _ENGINE,
    "_do_optimizer_sanity_check",
    "refusal of unsupported settings, names of parameters and checkpoints under DeepSpeed",
)
ENGINE_CONFIG = _refused(_ENGINE, "_config")
CONFIG_VALUES = _refused("deepspeed.runtime.config.DeepSpeedConfig", "_param_dict")
PARTITION_GROUP = _deepspeed(_FLAT, "_dp_group", "training with ZeRO-1 and 2")
MASTER_WEIGHTS = _deepspeed(
    _FLAT,
    "_hp_mapping",
    "ZeRO-1 and 2: the error for changed weights, memory after a universal checkpoint",
)
ZERO_3 = _deepspeed(_PARTITIONED, "_z3_optimizer", "training with ZeRO-3")
UPDATE_PARTITION = _deepspeed(
    _STAGE_3,
    "_reassign_or_swap_out_partitioned_parameters",
    "checkpoint.load of weights under ZeRO-3",
)


# -- accelerate ------------------------------------------------------------------------------------

_accelerate = partial(Internal, ACCELERATE)
_accelerator = partial(_accelerate, "accelerate.accelerator.Accelerator")

ACCELERATOR = _accelerate(
    "accelerate.accelerator", "Accelerator", "checks and saving under accelerate"
)
PREPARED_OPTIMIZER = _accelerate(
    "accelerate.optimizer", "AcceleratedOptimizer", "checks of accelerator.prepare"
)
PREPARED_OPTIMIZER_BUILT = _accelerate(
    "accelerate.optimizer.AcceleratedOptimizer",
    "__init__",
    "accelerator.prepare of an optimizer that has trained",
)
PREPARE = _accelerator("prepare", "checks of accelerator.prepare")
PREPARE_OPTIMIZER = _accelerator("prepare_optimizer", "checks of accelerator.prepare_optimizer")
CLIP_NORM = _accelerator("clip_grad_norm_", 'gradient_sync="sketch": refusal of local clipping')
CLIP_VALUE = _accelerator("clip_grad_value_", 'gradient_sync="sketch": refusal of local clipping')
SAVE_STATE = _accelerator("save_state", "accelerator.save_state of sharded state")
PREPARED_OPTIMIZERS = _accelerator("_optimizers", "accelerator.save_state of sharded state")
REGISTERED_OBJECTS = _accelerator(
    "_custom_objects", "accelerator.save_state of an optimizer registered for checkpointing"
)


# -- transformers ----------------------------------------------------------------------------------

_TRAINER = "transformers.trainer.Trainer"
_HANDLER = "transformers.trainer_callback.CallbackHandler"

_transformers = partial(Internal, TRANSFORMERS)
_saved = partial(_transformers, feature="the Trainer's checkpoints of sharded state")
_checked = partial(_transformers, feature="checks of the Trainer")

TRAINER = _saved("transformers.trainer", "Trainer")
SAVE_OPTIMIZER = _saved(_TRAINER, "_save_optimizer_and_scheduler")
SAVE_TRIAL = _saved(_TRAINER, "_tune_save_checkpoint")
CALLBACK_HANDLER = _checked("transformers.trainer_callback", "CallbackHandler")
TRAINING_BEGINS = _checked(_HANDLER, "on_train_begin")
METRICS_LOGGED = _transformers(_HANDLER, "on_log", "AdaRankGradCallback")
CREATE_OPTIMIZER = _transformers(
    _TRAINER, "create_optimizer", "for_trainer: arguments that a trainer replaces"
)


# -- documented nowhere ----------------------------------------------------------------------------

_UNDOCUMENTED = {
    TORCH: {
        "torch.utils._python_dispatch.TorchDispatchMode": {
            "_should_skip_dynamo": "arg-dist plan: its speed"
        },
        "torch.ops.aten.mm.default": {"is_view": DISPATCH_MODE.feature},
        "torch.nn.parameter": {"is_lazy": "parameters without a shape"},
        "torch.distributed": {"AllToAllOptions": "collective_timeout"},
        "torch.distributed.AllToAllOptions": {"asyncOp timeout": "collective_timeout"},
        "torch._C._distributed_c10d.AllgatherOptions": {
            "asyncOp timeout": "collective_timeout of gathers"
        },
        "torch.distributed.ProcessGroup": {
            "allgather alltoall_base": "all communication",
            "bound_device_id": "the device of messages",
            "get_group_store": "collective_timeout: which processes do not answer",
        },
        "torch.distributed.ProcessGroupGloo": {
            "name": "collective_timeout: whether a thread watches",
            "options": "collective_timeout: the process group's own",
        },
        "torch.distributed.distributed_c10d._World": {"pg_map pg_names": GROUPS.feature},
    },
    DEEPSPEED: {
        _ENGINE: {
            "has_moe_layers mp_world_size pipeline_parallelism": "refusal of unsupported models",
            "global_steps load_checkpoint load_universal_checkpoint module optimizer "
            "save_checkpoint use_node_local_storage zero_optimization zero_optimization_stage "
            "zero_round_robin_gradients": "checkpoints by DeepSpeed",
        },
        "deepspeed.runtime.zero.utils": {
            "ZeRORuntimeException": "the note on checkpoints of another number of processes"
        },
        "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": {
            "fp16_groups fp32_groups refresh_fp32_params": "ZeRO-0 with bf16"
        },
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": {
            "refresh_fp32_params update_lp_params": "weights loaded under ZeRO-1 and 2"
        },
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": {
            "refresh_fp32_params update_lp_params": "weights loaded under ZeRO-1 with bf16"
        },
        "deepspeed.utils.tensor_fragment.tensor_fragment": {
            "hp_fragment optim_fragment": MASTER_WEIGHTS.feature
        },
        _PARTITIONED: {
            "ds_numel ds_process_group ds_shape ds_tensor partition_numel": ZERO_3.feature
        },
        _STAGE_3: {
            "fp16_groups fp32_partitioned_groups_flat get_param_id grad_position "
            "sub_group_to_group_id": ZERO_3.feature,
            "checkpoint_event_epilogue checkpoint_event_prologue "
            "refresh_fp32_params": "weights loaded under ZeRO-3",
        },
        "deepspeed.ops": {"__compatible_ops__": "starting on CPUs without a compilation"},
    },
    ACCELERATE: {
        "an Accelerator with DeepSpeed": {
            "deepspeed_engine_wrapped": "refusal of a second DeepSpeed engine"
        },
    },
    TRANSFORMERS: {
        _TRAINER: {"is_deepspeed_enabled": SAVE_OPTIMIZER.feature},
        _HANDLER: {"callbacks": METRICS_LOGGED.feature, "model optimizer": TRAINING_BEGINS.feature},
        "transformers.training_args.TrainingArguments": {
            "deepspeed_plugin": "for_trainer: refusal of a second optimizer"
        },
    },
}

UNDOCUMENTED = tuple(
    Internal(library, owner, name, feature)
    for library, owners in _UNDOCUMENTED.items()
    for owner, features in owners.items()
    for names, feature in features.items()
    for name in names.split()
)
"""Names that look public and are documented nowhere; their users take them as attributes."""
