"""No rank ever holds a whole model: a teacher or student of 3 GB loaded, compared and exported."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.config import Config, StudentConfig
from tests.memory import MIB, PeakMemory
from tests.models.made import tiny_llama
from tests.ranks import run_ranks

HERE = "tests.train.test_memory"
HIDDEN, INNER, LAYERS, VOCAB, HEADS = 2048, 5632, 28, 32_000, 16
EMBEDDING = VOCAB * HIDDEN
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
PARAMETERS = 2 * EMBEDDING + LAYERS * LAYER + HIDDEN
LARGEST = 2 * max(LAYER, EMBEDDING) / MIB
SLACK = 300  # MiB over the share and the largest layer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama of 3 GB in bfloat16, in files of a gigabyte, made one after another."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
    }
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "lm_head": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}self_attn.{name}"] = (HIDDEN, HIDDEN)
        shapes |= {
            f"{at}mlp.gate_proj": (INNER, HIDDEN),
            f"{at}mlp.up_proj": (INNER, HIDDEN),
            f"{at}mlp.down_proj": (HIDDEN, INNER),
            f"{at}input_layernorm": (HIDDEN,),
            f"{at}post_attention_layernorm": (HIDDEN,),
        }
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(EMBEDDING, generator=generator)).bfloat16()
    names, files, index = list(shapes), [], {}
    while names:
        tensors, size = {}, 0
        while names and size < 1 << 30:
            name, shape = names[0], shapes[names.pop(0)]
            count = torch.Size(shape).numel()
            weight = noise[:count].roll(len(names)).view(shape)
            tensors[f"{name}.weight"] = weight if len(shape) > 1 else torch.ones_like(weight)
            size += weight.nbytes
        files.append(f"model-{len(files):05d}.safetensors")
        save_file(tensors, folder / files[-1], metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, files[-1])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    assert sum((folder / file).stat().st_size for file in files) >= 3e9
    return folder


def teacher(model, engine, tp):
    return Config.model_validate(
        {
            "data": {"source": "python-stdlib", "seq_len": 64},
            "teacher": {"model": str(model), "engine": engine, "tp": tp, "dtype": "bfloat16"},
        }
    )


def loading(mesh, model, empty, engine):
    """MiB that loading takes over what the engine of an empty model does; and the rank's share."""
    from megadistill.teacher.engine import load_teacher

    load_teacher(teacher(empty, engine, mesh.tp), mesh, vocab_size=VOCAB)
    with PeakMemory() as memory:
        found = load_teacher(teacher(model, engine, mesh.tp), mesh, vocab_size=VOCAB)
    share = 2 * PARAMETERS / mesh.world
    if engine == "tensor_parallel":  # norms and the embedding are whole on every rank
        share = sum(p.nbytes for p in found.engine.module.parameters())
        share += found.head.weight_VH.nbytes
    else:
        share += found.head.weight_VH.nbytes
    return memory.taken, share / MIB


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    tiny_llama(folder, vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("engine", "tp"), [("tensor_parallel", 2), ("zero3", 1)])
def test_a_teacher_is_loaded_in_its_share_and_a_layer(model, empty, engine, tp, capsys):
    found = run_ranks(2, f"{HERE}:loading", tp=tp, model=model, empty=empty, engine=engine)
    with capsys.disabled():
        print(f"\n{engine}: " + ", ".join(f"{t:.0f} MiB of {s:.0f}" for t, s in found))  # noqa: T201
    for taken, share in found:
        assert taken <= share + LARGEST + SLACK


def referring(mesh, model, empty, dtype):
    """MiB that the reference of the comparison at start takes."""
    from megadistill.config import TeacherConfig
    from megadistill.models.probe_tokens import Probe
    from megadistill.teacher.reference import Reference

    tokens = torch.from_numpy(Probe.of(seq_len=64, vocab_size=VOCAB).tokens_T)
    for folder in (empty, model):
        with PeakMemory() as memory:
            section = TeacherConfig(model=str(folder), dtype=dtype)
            found = Reference(section, tokens, key="teacher.model", device=mesh.device)
            for hidden in (found.hidden_TH, found.exact_TH):
                found.log_probs(hidden, vocab_size=VOCAB)
    return memory.taken


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_is_compared_in_a_layer_in_any_dtype(model, empty, dtype, capsys):
    [taken] = run_ranks(1, f"{HERE}:referring", model=model, empty=empty, dtype=dtype)
    with capsys.disabled():
        print(f"\nreference in {dtype}: {taken:.0f} MiB, a layer {4 * LAYER / MIB:.0f}")  # noqa: T201
    assert taken <= 2 * 4 * LAYER / MIB + SLACK


def training(mesh, model, out):
    """MiB over the engine's own of loading a student and of exporting it; and the rank's share."""
    from megadistill.student.model import load_student
    from megadistill.train.export import export

    settings = {
        "train_batch_size": mesh.world,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    with PeakMemory() as loaded:
        student = load_student(StudentConfig(model=str(model)), mesh, deepspeed_config=settings)
    with PeakMemory() as exported:
        export(student, mesh, out, tokenizer=None, card=lambda: "a model")
    return loaded.taken, exported.taken, 2 * PARAMETERS / mesh.world / MIB


def exporting_without_room(mesh, model, out):
    import resource

    from megadistill.errors import StoreError
    from megadistill.student.model import load_student
    from megadistill.train.export import export

    settings = {"train_batch_size": mesh.world, "zero_optimization": {"stage": 3}}
    section = StudentConfig(model=str(model))
    student = load_student(section, mesh, deepspeed_config=settings)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        export(student, mesh, out, tokenizer=None, card=lambda: "a model")
    except StoreError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error"


def test_without_room_for_the_export_all_ranks_say_so_and_nothing_is_left(empty, tmp_path):
    out = tmp_path / "out"
    said = run_ranks(2, f"{HERE}:exporting_without_room", model=empty, out=out)
    assert said == [f"{tmp_path}/.out.weights: cannot write: File too large"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_student_is_loaded_and_exported_a_parameter_at_a_time(model, empty, tmp_path, capsys):
    run_ranks(2, f"{HERE}:training", model=empty, out=tmp_path / "empty")
    found = run_ranks(2, f"{HERE}:training", model=model, out=tmp_path / "out")
    with capsys.disabled():
        print(  # noqa: T201
            "\nstudent: "
            + ", ".join(
                f"loaded in {loaded:.0f} MiB of {share:.0f}, exported in {exported:.0f}"
                for loaded, exported, share in found
            )
        )
    for loaded, exported, share in found:
        assert loaded <= share + LARGEST + SLACK
        assert exported <= LARGEST + SLACK  # over the share, which is held already
    ours, theirs = (sorted(folder.glob("*.safetensors")) for folder in (tmp_path / "out", model))
    weights = {name: value for file in theirs for name, value in load_file(file).items()}
    for file in ours:
        for name, value in load_file(file).items():
            assert torch.equal(value, weights.pop(name))
    assert not weights
    assert not list(tmp_path.glob(".*"))  # what it lay in meanwhile is gone
