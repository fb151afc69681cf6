"""How the tools of the field write a LoRA down: diffusers, PEFT, Kohya (as A1111 reads it), and LyCORIS' three kinds.

A key is a module and a role. `ENDINGS` says which role a key's ending stands for; `spellings` says what the tools call
a module, so that looking one up needs no rule for going back. `KINDS` turns the tensors of a module into two factors:
a LoHa or LoKr is a LoRA too, of higher rank. Names and shapes here are those of a diffusers file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxdiff.checkpoint import original, safetensors
from flaxdiff.checkpoint.tensors import Tensors, damaged
from flaxdiff.core import Spec

ENDINGS = (  # (regex of the ending, role)
    (r"\.lora_(?:A|down)(?:\.\w+)?\.weight", "down"),  # PEFT (with an adapter's name while it trains), Kohya
    (r"\.lora_(?:B|up)(?:\.\w+)?\.weight", "up"),
    (r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight", "down"),  # diffusers before PEFT
    (r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.weight", "up"),
    (r"(?<=_lora\d)\.down\.weight", "down"),  # XLabs
    (r"(?<=_lora\d)\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),  # LoCon with a core between the factors of a convolution
    (r"(?:_lora|\.lora|\.lora_linear_layer)?\.alpha", "alpha"),
    (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude"),  # DoRA
    (r"\.dora_scale", "dora_scale"),  # of Kohya and LyCORIS, which may have norms of inputs in it
    *((rf"\.hada_{w}", f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b")),
    *((rf"\.lokr_{w}", f"lokr_{w}") for w in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
)
PREFIXES = {  # component -> what its modules' names begin with, apart from the component's own name
    "unet": ("base_model.model.", "base_model.model.unet.", "", "lora_unet_"),
    "transformer": ("base_model.model.", "base_model.model.transformer.", "diffusion_model.", "")
    + ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
OLDER = ((r"\.to_out\.0$", ".to_out"), (r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1"))  # diffusers before PEFT
_QKV, _BLOCK = (("q", "0:1"), ("k", "1:2"), ("v", "2:3")), r"transformer_blocks\.(\d+)\."
XLABS: original.Rules = (  # of Flux's attentions, text and picture by number
    *((rf"^{_BLOCK}attn\.to_{x}$", rf"double_blocks.\1.qkv_lora1[{part}/3]") for x, part in _QKV),
    *((rf"^{_BLOCK}attn\.add_{x}_proj$", rf"double_blocks.\1.qkv_lora2[{part}/3]") for x, part in _QKV),
    (rf"^{_BLOCK}attn\.to_out\.0$", r"double_blocks.\1.proj_lora1"),
    (rf"^{_BLOCK}attn\.to_add_out$", r"double_blocks.\1.proj_lora2"),
    *((rf"^single_{_BLOCK}attn\.to_{x}$", rf"single_blocks.\1.qkv[{part}/3]") for x, part in _QKV),
    (rf"^single_{_BLOCK}proj_out$", r"single_blocks.\1.proj"),
)
METADATA = "lora_adapter_metadata"  # diffusers' key in a file's header: PEFT's configuration as JSON


class Factors(NamedTuple):
    """ΔW = scale · up · down, with ΔW as PyTorch flattens it: [out, in · kh · kw]; and DoRA's magnitudes."""

    down: np.ndarray  # [rank, in · kh · kw]
    up: np.ndarray  # [out, rank]
    scale: float
    magnitude: np.ndarray | None = None  # [out]


def spellings(component: str, spec: Spec, module: str) -> Iterator[str]:
    """What the tools call a module of a component, e.g. "unet", "mid_block.attentions.0.proj_in".

    What is a part of theirs ends as of `original.rows`.
    """
    called = {module, module.removeprefix("text_model.")}
    if component in ("unet", "transformer") and spec.module.__name__ in original.RULES:
        (old,) = original.names(spec, [f"{module}.weight"]).values()
        called.add(old.replace(".weight", ""))
    if spec.module.__name__ == "FluxTransformer2DModel":
        called.add(original.renamed(XLABS, module))
    for pattern, old in OLDER:
        called |= {re.sub(pattern, old, name) for name in called}
    for name in called:
        yield f"{component}.{name}"
        for prefix in PREFIXES.get(component, ()):
            whole = original.whole(name)
            joined = whole.replace(".", "_") if prefix.startswith("lora_") else whole
            yield prefix + joined + name[len(whole) :]


def modules(tensors: Tensors) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of a file by module and role, and those of no known role."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        for ending, role in ENDINGS:
            if match := re.fullmatch(rf"(.+?){ending}", key):
                found.setdefault(match[1].replace(".processor", ""), {})[role] = key
                break
        else:
            unknown.append(key)
    return found, unknown


# --- the tensors of a module as two factors ---------------------------------------------------------------------------


def _flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1)


def _lora(t: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    down, up = _flat(t["down"]), _flat(t["up"])
    if "mid" in t:
        down = _flat(np.einsum("ijkl,jc->ickl", t["mid"], down))
    return down, up, len(down)


def _loha(t: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    # (a1 b1) ∘ (a2 b2): the rank-one terms of both multiply out.
    a1, b1, a2, b2 = (_flat(t[f"hada_{w}"]) for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return (b1[:, None] * b2).reshape(-1, b1.shape[1]), _flat(a1[:, :, None] * a2[:, None]), len(b1)


def _lokr(t: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int | None]:
    # (a1 b1) ⊗ (a2 b2) = (a1 ⊗ a2) (b1 ⊗ b2); a matrix that is whole stands beside a unit matrix.
    rank, ups, downs = None, [], []
    for w in ("lokr_w1", "lokr_w2"):
        if w in t:
            whole = _flat(t[w])
            wide = whole.shape[0] <= whole.shape[1]
            up, down = (np.eye(len(whole)), whole) if wide else (whole, np.eye(whole.shape[1]))
        else:
            up, down = _flat(t[f"{w}_a"]), _flat(t[f"{w}_b"])
            rank = len(down)
        ups.append(up)
        downs.append(down)
    return np.kron(*downs), np.kron(*ups), rank


KINDS = (  # (a role that only this kind has, the reader)
    ("down", _lora),
    ("hada_w1_a", _loha),
    ("lokr_w1", _lokr),
    ("lokr_w1_a", _lokr),
)


def factors(tensors: Tensors, keys: Mapping[str, str], alpha: float | None = None, part: str = "") -> Factors:
    """The two factors of a module.

    Args:
      tensors: of the file.
      keys: role -> key.
      alpha: what the file's configuration says, in place of a key of its own.
      part: which rows of what they update, as `original.rows` has it; by default all.

    Raises:
      KeyError: a factor is missing; it is the role.
      ValueError: the factors do not multiply, or magnitudes are not those of outputs.
    """
    read = {}
    for role, key in keys.items():
        with tensors[key].view() as numbers:
            read[role] = np.asarray(numbers, np.float32)
    kind = next((kind for role, kind in KINDS if role in keys), _lora)
    down, up, rank = kind(read)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"factors of {list(up.shape)} and {list(down.shape)} do not multiply")
    magnitude = read.get("magnitude", read.get("dora_scale"))
    if magnitude is not None and (magnitude.size != len(up) or "dora_scale" in read and len(magnitude) != len(up)):
        raise ValueError(f"magnitudes of {list(magnitude.shape)}, not one for each of its {len(up)} outputs")
    chosen = original.rows(part, len(up))
    if chosen is not None:
        up, magnitude = up[chosen], None if magnitude is None else magnitude.reshape(-1)[chosen]
    alpha = float(read["alpha"].reshape(())) if "alpha" in read else alpha
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    numbers = (down, up, scale) if magnitude is None else (down, up, scale, magnitude)
    if not all(np.isfinite(a).all() for a in numbers):
        raise ValueError("infinities or NaNs")
    return Factors(down.astype(np.float32), up.astype(np.float32), scale, magnitude)


# --- what a configuration beside the numbers says ---------------------------------------------------------------------


def configured(path: Path) -> dict[str, Any]:
    """PEFT's configuration, from the header of a file or from the `adapter_config.json` beside it.

    Keys begin with the component, as diffusers writes them ("unet.lora_alpha"); empty where there is none.
    """
    beside = path.parent / "adapter_config.json"
    try:
        if path.suffix == ".safetensors" and METADATA in (notes := safetensors.notes(path)):
            found = json.loads(notes[METADATA])
        elif path.stem.startswith("adapter_model") and beside.is_file():
            said = json.loads(beside.read_text(encoding="utf-8")).items()
            found = {f"{denoiser}.{k}": v for denoiser in ("unet", "transformer") for k, v in said}
        else:
            return {}
        return dict(found)
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(path, f"its configuration is not JSON of a LoRA ({error})") from error


def alpha(config: Mapping[str, Any], component: str, module: str, rank: int) -> float | None:
    """The alpha that a configuration gives to a module; None if it says nothing."""
    pattern = config.get(f"{component}.alpha_pattern") or {}
    own = [value for name, value in pattern.items() if module == name or module.endswith(f".{name}")]
    found = (*own, config.get(f"{component}.lora_alpha"))[0]
    if found is not None and config.get(f"{component}.use_rslora"):
        return float(found) * math.sqrt(rank)
    return None if found is None else float(found)
