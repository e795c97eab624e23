"""peft's adapter format, read and written: the mapping between its parameters and ours, as pure functions.

Both sides hold, for every layer, a spec as in loft.save's file: {method, side, dtype, config, state}. `loft.from_peft`
and `loft.to_peft` are the way in. The mapping, with q a strictly upper skew generator and W the layer's weight:

    peft                                          here
    OFT    oft_R.weight (blocks, b(b−1)/2)        block: generator = −q for Cayley–Neumann, +q for the exact Cayley
                                                  (peft rotates rows by x B with B = I + 2Q + …, or (I − Q)(I + Q)⁻¹)
    BOFT   boft_R (m, blocks, b, b), boft_s       butterfly: generator = upper part of ½ (boft_R − boft_Rᵀ); magnitude
    HRA    hra_u (in, r)                          householder: u
    PSOFT  psoft_R.weight, .vector_a, .vector_b   cayley(_neumann) on principal P: generator = q, α = a, β = b
    LoRA   lora_A.weight, lora_B.weight           lora: A, B, α
"""
from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn


def read_peft(source, model: nn.Module | None) -> tuple[dict[str, nn.Module], dict, Callable[[], nn.Module]]:
    """({layer: its plain module}, payload, a function that gives the plain base model) of a PeftModel, or of a folder and
    its base model. Nothing is touched before that function is called. Raises ValueError by name.
    """
    supports = {}
    if isinstance(source, nn.Module):
        from peft import get_peft_model_state_dict
        if not hasattr(source, "peft_config"):
            raise ValueError(f"a {type(source).__name__} is not a PeftModel; of a folder that peft wrote: from_peft(folder, base_model)")
        named = {n.removeprefix("base_model.model."): m for n, m in source.named_modules()}
        if merged := [n for n, m in named.items() if getattr(m, "merged_adapters", None)]:
            raise ValueError(f"layer {merged[0]!r} has its adapter merged: source.unmerge_adapter() first")
        if len(source.peft_config) > 1:
            raise ValueError(f"the peft model has several adapters: {', '.join(source.peft_config)}; delete all but one")
        [(adapter, config)] = source.peft_config.items()
        for n, m in named.items():
            if adapter in getattr(m, "scaling", ()) and "LORA" in str(config.peft_type):
                r = m.r[adapter] ** (0.5 if config.use_rslora else 1)
                if abs(m.scaling[adapter] * r - m.lora_alpha[adapter]) > 1e-6 * m.lora_alpha[adapter]:
                    raise ValueError(f"layer {n!r} is scaled by hand: unscale_layer() first")
        config, tensors = config.to_dict(), {k: v.clone() for k, v in get_peft_model_state_dict(source).items()}
        supports = {n: m._psoft_A_cache[adapter].mT.clone() for n, m in named.items() if hasattr(m, "_psoft_A_cache")}
        modules = {n: m.get_base_layer() if hasattr(m, "get_base_layer") else m for n, m in named.items()}
        unload = source.unload
    else:
        if model is None:
            raise ValueError("from_peft(folder, model) needs the base model that the adapter was trained on")
        folder, modules, unload = Path(source), dict(model.named_modules()), lambda: model
        config = json.loads((folder / "adapter_config.json").read_text())
        if (folder / "adapter_model.safetensors").exists():
            tensors = _safetensors().load_file(folder / "adapter_model.safetensors")
        else:
            tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    kind = str(getattr(config["peft_type"], "value", config["peft_type"]))
    if kind not in READERS:
        raise ValueError(f"peft's {kind} has no counterpart here; these have: {', '.join(READERS)}")
    for option, harmless in {**UNSUPPORTED, **REFUSED.get(kind, {})}.items():
        if config.get(option, harmless) not in (harmless, None, "none", [], {}):
            raise ValueError(f"peft's {kind} with {option}={config[option]!r} has no counterpart here")
    for option in ("module_dropout", "boft_dropout", "psoft_dropout", "lora_dropout"):
        if config.get(option):
            warnings.warn(f"{option}={config[option]} is not carried over: same outputs in eval mode, no dropout in training")

    if kind == "LORA" and not isinstance(source, nn.Module) and config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ValueError(f"peft's LORA with init_lora_weights={config['init_lora_weights']!r} changed the base weights: load it with "
                         "peft, and give that model")
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, part = key.removeprefix("base_model.model."), None
        for known in PARTS:
            if f".{known}" in name:
                name, part = name.split(f".{known}")[0], name[name.index(f".{known}") + 1:]
        if part is None:
            raise ValueError(f"the peft adapter holds {key!r}, which has no counterpart here")
        by_layer.setdefault(name, {})[part] = value
    specs = {}
    for name, parts in by_layer.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"layer {name!r} is {type(layer).__name__ if layer else 'missing'}; only nn.Linear is carried over")
        try:
            spec = READERS[kind](parts, config, layer, supports.get(name))
        except ValueError as e:
            raise ValueError(f"layer {name!r}: {e}") from None
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        specs[name] = dict(method=kind.lower(), side="input", dtype=str(dtype).removeprefix("torch."),
                           shape=[layer.in_features, layer.out_features], config=spec[0], state=spec[1])
    return {n: modules[n] for n in specs}, {"format": "loft", "version": 1, "layers": specs, "trainable": {}}, unload


def write_peft(payload: dict, weights: dict[str, Tensor], path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors. Raises ValueError for what peft cannot say."""
    if payload["trainable"]:
        raise ValueError(f"{', '.join(payload['trainable'])} train beside the adapter; peft's file has no place for them here: "
                         "freeze them, or save them apart")
    configs, tensors = {}, {}
    for name, spec in payload["layers"].items():
        try:
            config, parts = _write_layer(spec, weights[name])
        except ValueError as e:
            raise ValueError(f"layer {name!r}: {e}") from None
        configs.setdefault(json.dumps(config, sort_keys=True), []).append(name)
        tensors |= {f"base_model.model.{name}.{k}": v.contiguous().clone() for k, v in parts.items()}
    if len(configs) > 1:
        raise ValueError("peft has one setting for all layers; here they differ: "
                         + "; ".join(f"{names[0]!r} has {c}" for c, names in configs.items()))
    config = json.loads(next(iter(configs))) | {
        "target_modules": "|".join(map(re.escape, sorted(payload["layers"]))), "inference_mode": True}   # these alone: a list means suffixes
    save_file = _safetensors().save_file
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for file, write in (("adapter_model.safetensors", lambda f: save_file(tensors, f, metadata={"format": "pt"})),
                        ("adapter_config.json", lambda f: Path(f).write_text(json.dumps(config, indent=1)))):
        write(temporary := folder / f".{file}.tmp")
        os.replace(temporary, folder / file)


# ---------------------------------------------------------------------------------------------------------
# The mapping, one function a method: (peft's tensors, its config, the layer, PSOFT's support) → (config, state)
# ---------------------------------------------------------------------------------------------------------

def _read_oft(parts, config, layer, _):
    q = parts["oft_R.weight"]                                                 # (blocks or 1, b(b−1)/2)
    b = round((1 + (1 + 8 * q.shape[1]) ** 0.5) / 2)
    neumann = config.get("use_cayley_neumann", True)
    options = dict(block_size=b, map="cayley_neumann" if neumann else "cayley", share=bool(config.get("block_share")))
    if neumann:
        options["terms"] = _terms(config)
    if config.get("coft"):                                                    # peft: ‖Q‖_F ≤ ε/√blocks, projected in place
        options["bound"] = config.get("eps", 6e-5) / q.shape[0] ** 0.5
    return (dict(d=layer.in_features, transform="block", scale=False, **options),
            {"rotation.transform.generator": (-q if neumann else q)[None]})


def _read_boft(parts, config, layer, _):
    R, s = parts["boft_R"], parts["boft_s"]                                   # (m, blocks, b, b), (out, 1)
    i, j = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    state = {"rotation.transform.generator": ((R - R.mT) / 2)[..., i, j], "magnitude": s.flatten()}
    return dict(d=layer.in_features, transform="butterfly", scale=False, block_size=R.shape[-1], stages=R.shape[0]), state


def _read_hra(parts, config, layer, _):
    u = parts["hra_u"]
    return dict(d=layer.in_features, transform="householder", scale=False, reflections=u.shape[1]), {"rotation.transform.u": u}


def _read_psoft(parts, config, layer, P):
    r = config["r"]
    if P is None:                                                             # peft computes it again at load: so do we
        P = _principal(layer.weight, r)
    gauge = {}
    if config.get("ab_svd_init", "psoft_init") == "pissa_init":
        P = P / P.norm(dim=0)
        gauge = {"rotation.gauge": (layer.weight.float() @ P).norm(dim=0).sqrt()}
    options = dict(transform="cayley", scale="psoft_R.vector_a" in parts)
    if config.get("use_cayley_neumann"):
        options |= dict(transform="cayley_neumann", terms=_terms(config), bound=config.get("cayley_neumann_eps"))
    state = {"rotation.P": P, "rotation.transform.generator": parts["psoft_R.weight"][None, None], **gauge}
    if ("psoft_R.vector_a" in parts) != ("psoft_R.vector_b" in parts):
        one = parts.get("psoft_R.vector_a", parts.get("psoft_R.vector_b"))
        parts = {"psoft_R.vector_a": torch.ones_like(one), "psoft_R.vector_b": torch.ones_like(one), **parts}
        options["scale"] = True
    if options["scale"]:
        state |= {"rotation.alpha": parts["psoft_R.vector_a"], "rotation.beta": parts["psoft_R.vector_b"]}
    return dict(d=layer.in_features, **options), state


def _read_lora(parts, config, layer, _):
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    alpha = config["lora_alpha"] * (A.shape[0] ** 0.5 if config.get("use_rslora") else 1)
    return (dict(d=layer.in_features, out=layer.out_features, rank=A.shape[0], lora_alpha=alpha, transform="lora"),
            {"rotation.A": A, "rotation.B": B})


def _write_layer(spec: dict, W: Tensor) -> tuple[dict, dict[str, Tensor]]:
    """peft's config and tensors of one layer."""
    config, state = spec["config"], spec["state"]
    name, P, magnitude = config["transform"], state.get("rotation.P"), state.get("magnitude")
    if config.get("terms") == 3 and "cayley_neumann" in (name, config.get("map")):
        raise ValueError("peft has no Cayley–Neumann series of 3 terms: its 3 means 4")
    if any(k.startswith("past.") for k in state):
        raise ValueError("it was refreshed, and a product of rotations has no place in peft's file")
    if spec["side"] != "input":
        raise ValueError("peft's orthogonal methods rotate the input side only")
    if magnitude is not None and name != "butterfly" and not (magnitude == 1).all():
        raise ValueError("peft has a magnitude for BOFT only")
    if config.get("scale") and P is None:
        raise ValueError("peft has scaling vectors for PSOFT only")
    q = state.get("rotation.transform.generator")
    if name == "lora":
        rank = config["rank"]
        return (dict(peft_type="LORA", r=rank, lora_alpha=rank if config["lora_alpha"] is None else config["lora_alpha"]),
                {"lora_A.weight": state["rotation.A"], "lora_B.weight": state["rotation.B"]})
    if name == "householder" and P is None:
        u = state["rotation.transform.u"]
        return dict(peft_type="HRA", r=u.shape[1], apply_GS=False), {"hra_u": u}
    if name == "block" and P is None:
        kind, b = config.get("map", "cayley"), round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
        if kind == "expm":
            raise ValueError("peft's OFT has no map='expm'")
        coft = dict(coft=True, eps=config["bound"] * q.shape[1] ** 0.5) if config.get("bound") is not None else {}
        return (dict(peft_type="OFT", r=0, oft_block_size=b, block_share=bool(config.get("share")), **coft,
                     use_cayley_neumann=kind == "cayley_neumann", num_cayley_neumann_terms=config.get("terms", 5)),
                {"oft_R.weight": (-q if kind == "cayley_neumann" else q)[0]})
    if name == "butterfly" and P is None:
        if config.get("map", "cayley") != "cayley" or config.get("bound") is not None or config.get("share"):
            raise ValueError("peft's BOFT is the exact Cayley map, without bound or sharing")
        m, blocks, entries = q.shape
        b = round((1 + (1 + 8 * entries) ** 0.5) / 2)
        i, j = torch.triu_indices(b, b, 1)
        R = q.new_zeros(m, blocks, b, b)
        R[..., i, j], R[..., j, i] = q, -q
        s = torch.ones(W.shape[0]) if magnitude is None else magnitude
        return (dict(peft_type="BOFT", boft_block_size=b, boft_block_num=0, boft_n_butterfly_factor=m),
                {"boft_R": R, "boft_s": s.to(q.dtype)[:, None]})
    if name in ("cayley", "cayley_neumann") and P is not None:
        return _write_psoft(config, state, W)
    raise ValueError(f"peft has no {name!r} on {'all coordinates' if P is None else 'a chosen support'}")


def _write_psoft(config: dict, state: dict, W: Tensor) -> tuple[dict, dict[str, Tensor]]:
    """PSOFT's file has no support, peft takes the principal one: so P has to span it, and T is turned into its basis."""
    P, q, gauge = state["rotation.P"], state["rotation.transform.generator"][0, 0], state.get("rotation.gauge")
    r = P.shape[1]
    if config["transform"] == "cayley" and config.get("bound") is not None:
        raise ValueError("peft's PSOFT has a bound for Cayley–Neumann only")
    theirs = _principal(W, r).to(P)
    turn = P.mT @ theirs                                                      # P T Pᵀ = P' (OᵀTO) P'ᵀ with O = PᵀP'
    if (turn.mT @ turn - torch.eye(r, dtype=P.dtype)).abs().max() > 1e-3:
        raise ValueError("its support does not span W0's principal one, and peft's PSOFT knows no other")
    i, j = torch.triu_indices(r, r, 1)
    Q = q.new_zeros(r, r)
    Q[i, j], Q[j, i] = q, -q
    parts = {"psoft_R.weight": (turn.mT @ Q @ turn)[i, j]}
    if config.get("scale") or gauge is not None:
        if (turn.abs() - torch.eye(r, dtype=P.dtype)).abs().max() > 1e-3:
            raise ValueError("its scaling vectors belong to another basis of the principal support than peft's")
    if config.get("scale"):
        parts |= {"psoft_R.vector_a": state["rotation.alpha"], "psoft_R.vector_b": state["rotation.beta"]}
    neumann = config["transform"] == "cayley_neumann"
    options = dict(num_cayley_neumann_terms=config.get("terms", 5), cayley_neumann_eps=config.get("bound", 0.9)) if neumann else {}
    return dict(peft_type="PSOFT", r=r, psoft_alpha=r, psoft_mag_a=bool(config.get("scale")), psoft_mag_b=bool(config.get("scale")),
                ab_svd_init="psoft_init" if gauge is None else "pissa_init", use_cayley_neumann=neumann, **options), parts


READERS = {"OFT": _read_oft, "BOFT": _read_boft, "HRA": _read_hra, "PSOFT": _read_psoft, "LORA": _read_lora}
PARTS = ("oft_R", "boft_R", "boft_s", "hra_u", "psoft_R", "lora_A", "lora_B")
UNSUPPORTED = {"bias": "none", "modules_to_save": None, "fan_in_fan_out": False}   # {option: its harmless value}
REFUSED = {"HRA": {"apply_GS": False}, "PSOFT": {"psoft_orth": True, "psoft_svd": "full"},
           "LORA": {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}}


def _terms(config: dict) -> int:
    """Matrices in peft's Cayley–Neumann series, which closes with one more power than 3 says."""
    return 4 if config.get("num_cayley_neumann_terms", 5) == 3 else config.get("num_cayley_neumann_terms", 5)


def _principal(W: Tensor, r: int) -> Tensor:
    """The support as peft computes it: torch.linalg.svd in float32."""
    return torch.linalg.svd(W.detach().float(), full_matrices=False)[2][:r].mT.contiguous()


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("peft's files are safetensors: pip install safetensors") from None
    return safetensors.torch
