"""`merge_to_directory`: a complete checkpoint that libraries load, or nothing at all."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from mergemix.checkpoints import writer
from mergemix.checkpoints.checkpoint import fingerprint, open_checkpoint
from mergemix.checkpoints.family import open_family
from mergemix.errors import NonFiniteError, OutputError
from mergemix.merge import merge_to_directory, sinks
from mergemix.mixture import Mixture
from tests.merge.families import NAMES, bits, expected, tiny_family, write_family

UNIFORM = Mixture.uniform(NAMES)
INDEX = "model.safetensors.index.json"


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def dead_process_id() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("shards", [1, 3])
def test_the_result_has_the_template_s_layout(tmp_path: Path, shards: int) -> None:
    family = tiny_family(tmp_path, with_base=True, shards=(shards, 2, 1, 3))
    out = tmp_path / "merged"
    stats = merge_to_directory(family, UNIFORM, out)
    result = open_checkpoint("merged", str(out))
    assert [(t.name, t.path.name, t.dtype, t.shape) for t in result.tensors.values()] == [
        (t.name, t.path.name, t.dtype, t.shape) for t in family.template.tensors.values()
    ]
    for path in out.glob("*.safetensors"):
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert (out / INDEX).exists() == (shards > 1)
    if shards > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == stats.bytes_written
        assert index["weight_map"] == {t.name: t.path.name for t in family.template.tensors.values()}
    assert sorted(os.listdir(tmp_path)) == ["base", "code", "math", "merged", "web"]


def test_a_file_of_another_name_becomes_one_that_libraries_find(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, shards=(1,))
    root = family.template.root
    (root / "model.safetensors").rename(root / "weights.safetensors")
    family = open_family(None, {expert.name: expert.source for expert in family.experts})
    merge_to_directory(family, UNIFORM, tmp_path / "merged")
    assert sorted(os.listdir(tmp_path / "merged")) == ["config.json", "mergemix.json", "model.safetensors"]


def test_names_and_metadata_of_any_script_survive(tmp_path: Path) -> None:
    tensors = {'a "quoted\\ name': torch.ones(3), "ünïcode/数学": torch.zeros(0, 2), "": torch.ones(())}
    family = write_family(tmp_path, None, dict.fromkeys(NAMES, tensors))
    merge_to_directory(family, UNIFORM, tmp_path / "merged")
    assert set(open_checkpoint("m", str(tmp_path / "merged")).tensors) == set(tensors)


def test_what_belongs_to_the_model_is_copied_and_nothing_else(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, with_base=True, shards=(1,))
    kept = ["generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
            "modeling_own.py", "additional_chat_templates/tools.jinja"]  # fmt: skip
    left = ["optimizer.pt", "pytorch_model.bin", "training_args.bin", "trainer_state.json", "README.md",
            ".gitattributes", ".hidden.json", "logs/run.json", "pytorch_model.bin.index.json",
            "corpus.txt", "predictions.json", "all_results.json"]  # fmt: skip
    for name in kept + left:
        path = family.template.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    out = tmp_path / "merged"
    merge_to_directory(family, UNIFORM, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"config.json", "mergemix.json", "model.safetensors", *kept}
    assert all((out / name).read_text() == name for name in kept)


def test_side_files_are_copied_whole_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny_family(tmp_path)
    contents = {"tokenizer.json": bytes(range(256)) * 3, "merges.txt": b""}
    for name, content in contents.items():
        (family.template.root / name).write_bytes(content)
    sizes, pwrite = [], os.pwrite
    monkeypatch.setattr(sinks, "COPY_BYTES", 100)
    monkeypatch.setattr(os, "pwrite", lambda *args: sizes.append(pwrite(*args)) or sizes[-1])
    merge_to_directory(family, UNIFORM, tmp_path / "merged")
    assert {name: (tmp_path / "merged" / name).read_bytes() for name in contents} == contents
    assert sizes.count(100) >= 7


def test_a_parent_that_cannot_be_synced_is_told_and_the_result_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = writer._sync_directory

    def failing(path: str | Path) -> None:
        if Path(path) == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(writer, "_sync_directory", failing)
    with pytest.raises(OutputError, match=r"merged is complete, but .*Input/output error") as caught:
        merge_to_directory(tiny_family(tmp_path), UNIFORM, tmp_path / "merged")
    assert "left behind" not in str(caught.value)
    open_checkpoint("m", str(tmp_path / "merged"))


def test_transformers_loads_the_result(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    states = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="12KB")
        states[name] = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    family = open_family(None, {name: str(tmp_path / name) for name in NAMES})
    assert len({tensor.path for tensor in family.template.tensors.values()}) > 1
    mixture = Mixture.of(NAMES, {"math": 3, "code": 2, "web": 1})
    merge_to_directory(family, mixture, tmp_path / "merged", memory_bytes=4 * 4096)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    reference = expected(None, states, mixture)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    for name, tensor in reference.items():
        assert torch.equal(bits(loaded.state_dict()[name]), bits(tensor)), name


def test_the_cpu_path_needs_neither_torch_nor_an_engine(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    code = """
import sys
from pathlib import Path
from mergemix.checkpoints.family import open_family
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
root = Path(sys.argv[1])
family = open_family(None, {name: str(root / name) for name in sys.argv[2:]})
merge_to_directory(family, Mixture.uniform(family.names), root / "merged")
print([name for name in ("torch", "vllm", "transformers", "triton") if name in sys.modules])
"""
    done = run_python(code, tmp_path, *NAMES)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
    merge_to_directory(family, UNIFORM, tmp_path / "again")
    prints = [fingerprint(open_checkpoint("m", str(tmp_path / name))) for name in ("merged", "again")]
    assert prints[0] == prints[1]


def interrupt(done: int) -> None:
    raise KeyboardInterrupt


class TestNothingIsLeftBehind:
    """Whatever fails, the parent directory holds what it held before."""

    @pytest.fixture
    def parent(self, tmp_path: Path) -> Path:
        (tmp_path / "outputs").mkdir()
        return tmp_path / "outputs"

    def test_when_the_output_exists(self, tmp_path: Path, parent: Path) -> None:
        family = tiny_family(tmp_path)
        for path in tmp_path.glob("*/*.safetensors"):
            path.unlink()  # so that any reading would be another error
        (parent / "directory").mkdir()
        (parent / "file").touch()
        (parent / "dangling").symlink_to("nowhere")
        for name in ("directory", "file", "dangling", "."):
            with pytest.raises(OutputError, match="exists already"):
                merge_to_directory(family, UNIFORM, parent / name)
        assert sorted(os.listdir(parent)) == ["dangling", "directory", "file"]

    def test_when_the_parent_is_no_place_to_write(self, tmp_path: Path) -> None:
        family = tiny_family(tmp_path)
        (tmp_path / "file").touch()
        for out in (tmp_path / "absent" / "out", tmp_path / "file" / "out"):
            with pytest.raises(OutputError, match="not a directory; create it first"):
                merge_to_directory(family, UNIFORM, out)
        with pytest.raises(OutputError, match="cannot write"):  # even root may create nothing there
            merge_to_directory(family, UNIFORM, Path("/proc/merged"))

    def test_when_this_user_may_not_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        family = tiny_family(tmp_path)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests run as root, whom no mode stops
        with pytest.raises(OutputError, match="not writable"):
            merge_to_directory(family, UNIFORM, tmp_path / "out")

    def test_when_the_disk_is_too_small(
        self, tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family = tiny_family(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(OutputError, match=r"needs \d+ bytes, but only 100 are free"):
            merge_to_directory(family, UNIFORM, parent / "out")
        assert os.listdir(parent) == []

    @pytest.mark.parametrize("calls", [0, 1, 4, 6])
    def test_when_the_disk_fills_up(
        self, tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch, calls: int
    ) -> None:
        family = tiny_family(tmp_path, shards=(2,))
        left, pwrite = [calls], os.pwrite

        def full(file: int, data: memoryview, offset: int) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(file, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OutputError, match=r"No space left on device; free some space .* left behind"):
            merge_to_directory(family, UNIFORM, parent / "out", memory_bytes=1 << 20)
        assert os.listdir(parent) == []
        assert len(os.listdir("/proc/self/fd")) == before

    def test_when_closing_fails(self, tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        family, close = tiny_family(tmp_path), os.close

        def interrupt_and_fail(done: int) -> None:
            monkeypatch.setattr(os, "close", failing)
            raise KeyboardInterrupt

        def failing(descriptor: int) -> None:
            is_output = os.fstat(descriptor).st_ino in {
                path.stat().st_ino for path in parent.rglob("*.safetensors")
            }
            close(descriptor)
            if is_output:
                raise OSError(errno.EIO, "Input/output error")

        with pytest.raises(KeyboardInterrupt):
            merge_to_directory(family, UNIFORM, parent / "out", progress=interrupt_and_fail)
        assert os.listdir(parent) == []

    def test_when_the_new_directory_cannot_be_opened(
        self, tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family, open_ = tiny_family(tmp_path), os.open

        def failing(path: str | Path, *args: int) -> int:
            if Path(path).parent == parent:
                raise OSError(errno.EMFILE, "Too many open files")
            return open_(path, *args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing)
            with pytest.raises(OutputError, match="Too many open files"):
                merge_to_directory(family, UNIFORM, parent / "out")
        assert os.listdir(parent) == []

    def test_when_the_system_refuses_to_write_more(self, tmp_path: Path, parent: Path) -> None:
        tiny_family(tmp_path)
        code = """
import resource, sys
from pathlib import Path
from mergemix.checkpoints.family import open_family
from mergemix.errors import OutputError
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
root = Path(sys.argv[1])
family = open_family(None, {name: str(root / name) for name in sys.argv[2:]})
merge_to_directory(family, Mixture.uniform(family.names), root / "compiled")  # kernels may be kept in files too
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    merge_to_directory(family, Mixture.uniform(family.names), root / "outputs" / "out")
except OutputError as error:
    print(error)
"""
        done = run_python(code, tmp_path, *NAMES)
        assert "File too large; nothing was left behind" in done.stdout, done.stderr
        assert os.listdir(parent) == []

    def test_when_an_expert_is_broken(self, tmp_path: Path, parent: Path) -> None:
        tensors = {"a": torch.ones(4), "b": torch.tensor([1.0, float("nan")])}
        family = write_family(tmp_path, None, dict.fromkeys(NAMES, tensors))
        with pytest.raises(NonFiniteError):
            merge_to_directory(family, UNIFORM, parent / "out")
        assert os.listdir(parent) == []

    def test_when_the_user_interrupts(self, tmp_path: Path, parent: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            merge_to_directory(tiny_family(tmp_path), UNIFORM, parent / "out", progress=interrupt)
        assert os.listdir(parent) == []

    def test_when_somebody_else_makes_the_output_meanwhile(self, tmp_path: Path, parent: Path) -> None:
        with pytest.raises(OutputError, match="created by somebody else"):
            merge_to_directory(
                tiny_family(tmp_path),
                UNIFORM,
                parent / "out",
                progress=lambda done: (parent / "out").mkdir(exist_ok=True),
            )
        assert os.listdir(parent) == ["out"]
        assert os.listdir(parent / "out") == []


def test_a_killed_merge_leaves_no_checkpoint_and_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    code = """
import os, signal, sys
from pathlib import Path
from mergemix.checkpoints.family import open_family
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
root = Path(sys.argv[1])
family = open_family(None, {name: str(root / name) for name in sys.argv[2:]})
kill = lambda done: os.kill(os.getpid(), signal.SIGKILL)
merge_to_directory(family, Mixture.uniform(family.names), root / "outputs" / "out", progress=kill)
"""
    done = run_python(code, tmp_path, *NAMES)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = outputs.iterdir()
    assert left.name.startswith(".out.tmp-")
    assert not (left / "config.json").exists()

    # Beside it: a live process's (this one's parent), another output's, a user's, and one locked from elsewhere.
    dead = left.name.removeprefix(".out.tmp-")
    (outputs / f".out.tmp-{os.getpid()}").mkdir()  # of a killed process whose id is now ours
    locked = f".out.tmp-{dead_process_id()}"
    others = [
        f".out.tmp-{os.getppid()}",
        f".other.tmp-{dead}",
        ".out.tmp-notes",
        f".out.tmp-{dead}0000000",
        locked,
    ]
    for name in others:
        (outputs / name).mkdir()
    lock = os.open(outputs / locked, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    merge_to_directory(family, UNIFORM, outputs / "out")
    os.close(lock)
    assert sorted(os.listdir(outputs)) == sorted([*others, "out"])
