import dataclasses
import inspect
import json
import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_largescale
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import PLAN_VERSION, Plan
from lightning_largescale.techniques.precision.fields import MATMUL_TYPE

PLANS = st.builds(
    Plan,
    dp_replicate=st.integers(1, 2**20),
    dp_shard=st.integers(1, 2**20),
    tp=st.integers(1, 2**10),
    sequence_parallel=st.booleans(),
    reshard_after_forward=st.booleans(),
    precision=st.sampled_from([*MATMUL_TYPE]),
    activation_checkpointing=st.sampled_from(["none", "full"]),
)


@given(PLANS)
def test_json_round_trip(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)


def test_default_is_the_plain_run():
    assert Plan().world_size == 1
    assert Plan().describe() == "plain, one device, 32-true"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dp_replicate": 2}, "replicated on 2 devices, 32-true"),
        (
            {"dp_shard": 4, "activation_checkpointing": "full"},
            "ZeRO-3 over 4 devices, full activation checkpointing, 32-true",
        ),
        ({"dp_shard": 4, "reshard_after_forward": False}, "ZeRO-2 over 4 devices, 32-true"),
        (
            {"dp_shard": 2, "extra_fsdp_modules": ["embedding", "head"]},
            "ZeRO-3 over 2 devices, 2 more modules gathered by themselves, 32-true",
        ),
        (
            {"activation_checkpointing": "full", "checkpointed_operations": "cheap"},
            "plain, one device, full activation checkpointing but for products, 32-true",
        ),
        (
            {"dp_shard": 2, "extra_fsdp_modules": ["head"]},
            "ZeRO-3 over 2 devices, 1 more module gathered by itself, 32-true",
        ),
        ({"row_sharded_embeddings": ["users"]}, "plain, one device, 32-true"),
        (
            {"dp_replicate": 2, "row_sharded_embeddings": ["users", "items"]},
            "replicated on 2 devices, 2 row-sharded tables, 32-true",
        ),
        (
            {"dp_shard": 2, "row_sharded_embeddings": ["users"]},
            "ZeRO-3 over 2 devices, 1 row-sharded table, 32-true",
        ),
        ({"tp": 4, "extra_fsdp_modules": ["head"]}, "tensor parallel over 4 devices, 32-true"),
        ({"tp": 4, "sequence_parallel": True}, "tensor and sequence parallel over 4 devices, 32-true"),
        ({"dp_shard": 2, "tp": 4}, "ZeRO-3 over 2 devices, each tensor parallel over 4 devices, 32-true"),
        (
            {"dp_replicate": 2, "dp_shard": 4, "precision": "bf16-mixed"},
            "HSDP: 2 replicas, each ZeRO-3 over 4 devices, bf16-mixed",
        ),
    ],
)
def test_words(fields, words):
    assert Plan(**fields).describe() == words


def test_signature_is_kept_for_tools_that_read_it():
    assert list(inspect.signature(Plan).parameters) == [
        "dp_replicate",
        "dp_shard",
        "tp",
        "sequence_parallel",
        "reshard_after_forward",
        "precision",
        "activation_checkpointing",
        "checkpointed_blocks",
        "checkpointed_operations",
        "extra_fsdp_modules",
        "row_sharded_embeddings",
        "offload_parameters",
        "offload_optimizer",
        "cpu_optimizer_step",
        "offload_activations",
        "nvme_path",
        "resident_parameter_bytes",
        "cpu_parameter_bytes",
        "resident_optimizer_bytes",
        "cpu_optimizer_bytes",
        "offloaded_blocks",
        "prefetched_blocks",
        "release_gradients",
    ]


BAD = [
    ({"offload_optimizer": "disk"}, "offload_optimizer='disk' is not accepted; give None, 'cpu' or 'nvme'"),
    ({"nvme_path": 3}, "nvme_path=3 is not accepted; give the path of a folder"),
    ({"resident_optimizer_bytes": -1, "offload_optimizer": "cpu"}, "resident_optimizer_bytes=-1 is not accepted"),
    (
        {"cpu_optimizer_bytes": "much", "offload_optimizer": "nvme"},
        "cpu_optimizer_bytes='much' is no size; give 1 byte",
    ),
    ({"resident_parameter_bytes": 1}, "resident_parameter_bytes=1 contradicts offload_parameters=None; give 'cpu' or"),
    (
        {"cpu_optimizer_bytes": 1, "offload_optimizer": "cpu"},
        "cpu_optimizer_bytes=1 contradicts offload_optimizer='cpu'; give 'nvme' there, or leave it out",
    ),
    ({"cpu_optimizer_step": 1}, "cpu_optimizer_step=1 is not accepted; give True or False"),
    (
        {"cpu_optimizer_step": True},
        "cpu_optimizer_step=True contradicts offload_optimizer=None; give 'cpu' or 'nvme' there, or leave it out",
    ),
    ({"offloaded_blocks": ["a"]}, "offloaded_blocks=['a'] contradicts offload_activations=None; give 'cpu' or 'nvme'"),
    ({"offloaded_blocks": [], "offload_activations": "cpu"}, "offloaded_blocks=[] is not accepted; give the names"),
    ({"prefetched_blocks": 0}, "prefetched_blocks=0 is not accepted; give a whole number of blocks, 1 or more"),
    ({"release_gradients": 1}, "release_gradients=1 is not accepted; give True or False"),
    ({"release_gradients": True, "precision": "16-mixed"}, "release_gradients=True cannot be combined with precision="),
    ({"release_gradients": True, "dp_replicate": 2}, "release_gradients=True cannot be combined with dp_replicate=2"),
    (
        {"row_sharded_embeddings": ["users"], "offload_optimizer": "nvme"},
        "row_sharded_embeddings=('users',) cannot be combined with offload_optimizer='nvme'; leave one of them out",
    ),
    ({"dp_sard": 2}, "dp_sard=2 is no field of a Plan; accepted: dp_replicate, dp_shard,"),
    ({"dp_shard": 0}, "dp_shard=0 is not accepted; give a whole number of devices, 1 or more"),
    ({"dp_shard": "2"}, "dp_shard='2' is not accepted"),
    ({"dp_replicate": True}, "dp_replicate=True is not accepted"),
    ({"dp_replicate": 1.0}, "dp_replicate=1.0 is not accepted"),
    ({"tp": 0}, "tp=0 is not accepted; give a whole number of devices, 1 or more"),
    ({"sequence_parallel": 1}, "sequence_parallel=1 is not accepted; give True or False"),
    ({"reshard_after_forward": 1}, "reshard_after_forward=1 is not accepted; give True or False"),
    ({"precision": "fp8"}, "precision='fp8' is not accepted; give '32-true', 'bf16-mixed', '16-mixed', "),
    ({"precision": ["32-true"]}, "is not accepted; give '32-true', "),
    (
        {"activation_checkpointing": None},
        "activation_checkpointing=None is not accepted; give 'none', 'selective' or 'full'",
    ),
    ({"activation_checkpointing": "selective"}, "checkpointed_blocks=None is not accepted with activation_checkpoi"),
    (
        {"activation_checkpointing": "selective", "checkpointed_blocks": []},
        "give the names of the blocks, at least one",
    ),
    ({"activation_checkpointing": "selective", "checkpointed_blocks": "a"}, "checkpointed_blocks='a' is not accepted"),
    ({"activation_checkpointing": "selective", "checkpointed_blocks": ["a", "a"]}, "at least one and each once"),
    ({"checkpointed_operations": "some"}, "checkpointed_operations='some' is not accepted; give 'all' or 'cheap'"),
    (
        {"checkpointed_operations": "cheap"},
        "checkpointed_operations='cheap' contradicts activation_checkpointing='none'; give 'full' or 'selective'",
    ),
    ({"extra_fsdp_modules": "head"}, "extra_fsdp_modules='head' is not accepted; give the names of modules, each once"),
    ({"extra_fsdp_modules": ["head", "head"]}, "is not accepted; give the names of modules, each once, or none"),
    ({"row_sharded_embeddings": "users"}, "row_sharded_embeddings='users' is not accepted; give the names of modules"),
    (
        {"row_sharded_embeddings": [1]},
        "row_sharded_embeddings=[1] is not accepted; give the names of modules, each onc",
    ),
    (
        {"row_sharded_embeddings": ["users"], "tp": 2},
        "row_sharded_embeddings=('users',) cannot be combined with tp=2; leave one of them out",
    ),
    (
        {"row_sharded_embeddings": ["users"], "precision": "16-mixed"},
        "row_sharded_embeddings=('users',) cannot be combined with precision='16-mixed'; leave one of them out",
    ),
    (
        {"checkpointed_blocks": ["a"]},
        "checkpointed_blocks=['a'] contradicts activation_checkpointing='none'; give 'sel",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_fields_from_python(fields, message):
    with pytest.raises(PlanError) as error:
        Plan(**fields)
    assert message in str(error.value)


def test_amounts_may_be_given_as_text():
    plan = Plan(offload_parameters="nvme", resident_parameter_bytes="2GiB", cpu_parameter_bytes="512 MB")
    assert (plan.resident_parameter_bytes, plan.cpu_parameter_bytes) == (2 * 2**30, 512 * 10**6)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("fields", "message"), [row for row in BAD])
def test_bad_fields_from_json(fields, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    assert message in str(error.value)
    assert "plan.json" in str(error.value)


def test_positional():
    with pytest.raises(PlanError, match="takes its fields by name and got 2"):
        Plan(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the plan is no JSON"),
        ("[1]", "a plan is an object of fields"),
        ('{"dp_shard": 2, "dp_shard": 3}', "'dp_shard' is given twice in the plan, 2 and 3; give it once"),
        ('{"version": "x"}', "version='x' is not accepted"),
        (
            f'{{"version": {PLAN_VERSION + 1}, "tp": 2}}',
            f"of version {PLAN_VERSION + 1} and this release reads up to {PLAN_VERSION}",
        ),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_no_file(tmp_path):
    with pytest.raises(PlanError, match=r"none\.json' cannot be read \(No such file or directory\)"):
        Plan.load(tmp_path / "none.json")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"plan\.json: the plan is no text in UTF-8 .*; give a plan's JSON"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        (
            {"dp_shard": 3},
            8,
            r"dp_replicate=1, dp_shard=3, tp=1 makes 3 and there are 8 processes; dp_replicate \* dp_shard \* tp must"
            r" be their number, 8 \(devices \* num_nodes of a Trainer\), for example dp_shard=8\.",
        ),
        ({"dp_shard": 2, "dp_replicate": 2}, 1, r"there is 1 process; .* for example dp_replicate=1, dp_shard=1\."),
        ({"dp_shard": 4, "tp": 2}, 4, r"dp_shard=4, tp=2 makes 8 .* for example dp_shard=2, tp=2\."),
        ({"tp": 3}, 4, r"tp=3 makes 3 .* for example dp_shard=4\."),
        ({"dp_shard": 4, "dp_replicate": 4}, 32, r"makes 16 .* for example dp_replicate=4, dp_shard=8\."),
        ({"dp_shard": 4, "dp_replicate": 3}, 32, r"makes 12 .* for example dp_replicate=8, dp_shard=4\."),
        ({"dp_shard": 5, "dp_replicate": 3}, 32, r"makes 15 .* for example dp_replicate=1, dp_shard=32\."),
    ],
)
def test_sizes_against_devices(fields, world, message):
    with pytest.raises(PlanError, match=message):
        Plan(**fields).validate(SimpleNamespace(world_size=world, rates=None))
    Plan(dp_shard=8).validate(SimpleNamespace(world_size=8, rates=None))


def test_precision_against_devices():
    v100 = Hardware.named("V100-32GB")
    with pytest.raises(PlanError, match="precision='bf16-mixed' needs matrix products in bfloat16, which NVIDIA V100 "):
        Plan(precision="bf16-mixed").validate(v100)
    Plan(precision="bf16-mixed").validate(dataclasses.replace(v100, rates=None))
    Plan().validate(v100)


def test_against_the_model():
    with pytest.raises(
        PlanError, match="activation_checkpointing='full' needs repeated blocks and Linear has none; use 'none'"
    ):
        Plan(activation_checkpointing="full").validate(None, SimpleNamespace(parameters=(1,), blocks=(), name="Linear"))
    with pytest.raises(PlanError, match="Net has no parameters"):
        Plan().validate(None, SimpleNamespace(parameters=(), blocks=(), name="Net"))


def test_shown_as_it_is_written():
    for plan in (Plan(), Plan(dp_shard=2), Plan(tp=2, offload_activations="nvme", offloaded_blocks=("blocks.0",))):
        assert eval(repr(plan), {"Plan": Plan}) == plan
    assert repr(Plan(dp_shard=2, precision="bf16-mixed")) == "Plan(dp_shard=2, precision='bf16-mixed')"


def test_the_error_is_named_as_users_import_it():
    assert f"{PlanError.__module__}.{PlanError.__qualname__}" == "lightning_largescale.PlanError"
    assert lightning_largescale.PlanError is pickle.loads(pickle.dumps(PlanError))


RENAMED = {"wrapped_modules": ("extra_fsdp_modules", ("head",)), "host_optimizer_step": ("cpu_optimizer_step", True)}


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_field_is_read_under_its_old_name_with_a_warning(old):
    new, value = RENAMED[old]
    expected = Plan(dp_shard=2, offload_optimizer="cpu", **{new: value})
    fields = {"version": 1, "dp_shard": 2, "offload_optimizer": "cpu", old: value}
    with pytest.warns(DeprecationWarning, match=f"Plan.{old} is called {new} now"):
        assert Plan.from_json(json.dumps(fields)) == expected
    with pytest.warns(DeprecationWarning, match=f"Plan.{old} is called {new} now"):
        assert getattr(expected, old) == value
    with pytest.warns(DeprecationWarning, match=f"Plan.{old} is called {new} now"):
        assert dataclasses.replace(Plan(dp_shard=2, offload_optimizer="cpu"), **{old: value}) == expected
    assert old not in expected.to_json()
    assert old not in repr(expected)
