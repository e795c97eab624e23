"""peft's adapter folders, read onto a model and written from one.

    model = from_peft(model, folder)         # what loft.load does, from a folder of peft's
    to_peft(model, folder)                   # then peft.PeftModel.from_pretrained(base, folder)

The mapping, with q the strictly upper entries of a skew matrix, row by row:

    peft                                       here
    OFT    oft_R.weight (blocks, b(b−1)/2)     block: theta = −q for the Cayley–Neumann series, q
                                               for the exact map, peft's (I − Q)(I + Q)⁻¹
    BOFT   boft_R (m, blocks, b, b), boft_s    butterfly: theta = upper half of ½(boft_R − boft_Rᵀ),
                                               magnitude m = boft_s − 1
    HRA    hra_u (in, r)                       householder: theta = u
    PSOFT  psoft_R.weight, vector_a, vector_b  cayley or its series on W0's top r singular vectors:
                                               theta = q, scale = (a − 1, b − 1)
    LoRA   lora_A.weight, lora_B.weight        lora: A, and B times peft's α/r

peft rotates the input side of nn.Linear, and so does what is read here. Needs safetensors.
"""
import json
import re
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import loft
from loft import eye, naming, require, skew


def from_peft(model, folder):
    """Puts the adapter in peft's `folder` on its base model: all of it, or nothing.

    ValueError: names the method, option, layer or tensor that has no counterpart here.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    kind = config["peft_type"]
    require(kind in READERS, f"peft's {kind} has no counterpart here, as {', '.join(READERS)} have")
    for option, value in config.items():
        require(option in CARRIED or value in HARMLESS.get(option, UNSET),
                f"peft's {kind} with {option}={value!r} has no counterpart here")
        if option.endswith("_dropout") and value:
            warnings.warn(f"{option}={value} is not carried over: training goes on without dropout")

    there, parts, layers, state = loft.modules(model), {}, {}, {}
    for key, tensor in tensors.items():
        known = KEY.fullmatch(key)
        require(known, f"the peft adapter holds {key!r}, which has no counterpart here")
        parts.setdefault(known[1], {})[known[2]] = tensor
    for name, found in parts.items():
        with naming(name):
            base = there.get(name)
            require(isinstance(base, nn.Linear), f"it is a {type(base).__name__}, not an nn.Linear")
            settings, own = READERS[kind](found, config, base.weight)
        layers[name] = settings | dict(method=kind.lower(), side="input", magnitude=kind == "BOFT")
        state |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return loft.attach(model, dict(layers=layers, state=state))


@torch.no_grad()
def to_peft(model, folder):
    """Writes the model's adapter as peft's adapter_config.json and adapter_model.safetensors.

    ValueError, before anything is written: names the layer and what peft cannot say.
    """
    found, config, tensors = loft.adapted(model), None, {}
    others = [n for n, p in loft.plain_parameters(model).items() if p.requires_grad]
    require(not others, f"{', '.join(others)} train beside the adapter, for which peft's file has "
            "no place here: freeze them, or save them apart")
    for name, layer in found.items():
        with naming(name):
            own, parts = written(layer.settings, loft.adapter_state({"": layer}), layer.base.weight)
            config = config or own
            require(own == config, f"peft has one setting for all layers: {own}, before {config}")
        for part, tensor in parts.items():
            tensors[f"base_model.model.{name}.{part}"] = tensor.cpu().contiguous().clone()
    names = "|".join(map(re.escape, found))              # to peft a list would mean suffixes
    config |= dict(target_modules=names, peft_version="0.18.0")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------------
# What peft's configuration may hold

KEY = re.compile(r"base_model\.model\.(.+)\.(oft_R\.weight|boft_[Rs]|hra_u|lora_[AB]\.weight|"
                 r"psoft_R\.(?:weight|vector_[ab]))")
CARRIED = set(  # read below, said by the tensors, or without a meaning for what the layers compute
    "peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode "
    "target_modules exclude_modules layers_to_transform layers_pattern init_weights random_seed "
    "module_dropout boft_dropout psoft_dropout lora_dropout r rank_pattern lora_alpha use_rslora "
    "oft_block_size block_share coft eps use_cayley_neumann num_cayley_neumann_terms "
    "cayley_neumann_eps boft_block_size boft_block_num boft_n_butterfly_factor psoft_alpha "
    "psoft_mag_a psoft_mag_b psoft_svd_lowrank_niter qalora_group_size megatron_core".split())
HARMLESS = {  # of these options, the values that change nothing
    "psoft_orth": [True], "psoft_svd": ["full"], "ab_svd_init": ["psoft_init"],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"],
}
UNSET = [None, False, "none", [], {}]                    # and of all others


# --------------------------------------------------------------------------------------------------
# peft's tensors → settings and state of a layer with weight W

def read_oft(parts, config, W):
    q, (map, options) = parts["oft_R.weight"], series(config)            # (blocks or 1, b(b−1)/2)
    bound = config["eps"] / len(q) ** 0.5 if config["coft"] else None    # peft's is in place
    settings = dict(transform="block", scale=False, block_size=size(q), map=map, bound=bound,
                    share=config["block_share"], **options)
    return settings, {"rotation.transform.theta": (q if map == "cayley" else -q)[None]}


def read_boft(parts, config, W):
    R, s = parts["boft_R"], parts["boft_s"]              # (m, blocks, b, b), (out, 1)
    state = {"rotation.transform.theta": upper(R - R.mT) / 2, "magnitude.m": s.flatten() - 1}
    return dict(transform="butterfly", scale=False, block_size=R.shape[-1], stages=len(R)), state


def read_hra(parts, config, W):
    u = parts["hra_u"]
    return dict(transform="householder", scale=False, reflections=u.shape[1]), {
        "rotation.transform.theta": u}


def read_psoft(parts, config, W):
    q, (map, options) = parts["psoft_R.weight"], series(config)
    r, scaled = size(q), len(parts) > 1
    state = {"rotation.P": peft_support(W, r), "rotation.transform.theta": q[None, None]}
    if map != "cayley":
        options["bound"] = config["cayley_neumann_eps"]
    if scaled:                                           # by one of the vectors, or both
        vectors = [parts.get(f"psoft_R.vector_{v}", torch.ones(r)) for v in "ab"]
        state["rotation.scale"] = torch.stack(vectors) - 1
    return dict(transform=map, scale=scaled, **options), state


def read_lora(parts, config, W):
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    scaling = config["lora_alpha"] / len(A) ** (0.5 if config["use_rslora"] else 1)
    return dict(rank=len(A)), {"rotation.A": A, "rotation.B": B * scaling}


READERS = {
    "OFT": read_oft, "BOFT": read_boft, "HRA": read_hra, "PSOFT": read_psoft, "LORA": read_lora}


# --------------------------------------------------------------------------------------------------
# Settings s and state of a layer → peft's configuration and tensors

def written(s, state, W):
    theta, P = state.get("rotation.transform.theta"), state.get("rotation.P")
    name, map = s.get("transform"), s.get("map", "cayley")
    require(s["side"] == "input", "peft's methods rotate the input side only")
    require(not s["magnitude"] or name == "butterfly", "peft has a magnitude for BOFT only")
    require(P is not None or not s.get("scale"), "peft has scaling vectors for PSOFT only")
    if s["method"] == "lora":
        A, B = state["rotation.A"], state["rotation.B"]
        return dict(peft_type="LORA", r=len(A), lora_alpha=len(A)), {
            "lora_A.weight": A, "lora_B.weight": B}
    if P is not None:
        return written_psoft(s, P, theta, state.get("rotation.scale"), W)
    if name == "householder":
        return dict(peft_type="HRA", r=theta.shape[1]), {"hra_u": theta}
    if name == "block":
        require(map != "expm", "peft's OFT has no map='expm'")
        eps = (s.get("bound") or 0.0) * theta.shape[1] ** 0.5
        config = dict(peft_type="OFT", r=0, oft_block_size=size(theta), coft=eps > 0, eps=eps,
                      block_share=s.get("share", False), **peft_series(map, s))
        return config, {"oft_R.weight": (theta if map == "cayley" else -theta)[0]}
    require(name == "butterfly", f"peft has no {name!r} on all coordinates")
    require(map == "cayley" and s.keys().isdisjoint(["bound", "share"]),
            "peft's BOFT is the exact Cayley map, without bound or sharing")
    b, m = size(theta), state.get("magnitude.m", theta.new_zeros(len(W)))
    config = dict(peft_type="BOFT", boft_block_size=b, boft_n_butterfly_factor=len(theta))
    return config, {"boft_R": skew(theta, b), "boft_s": 1 + m[:, None]}


def written_psoft(s, P, theta, scale, W):
    """peft's file has no P, but takes W0's principal one: ours must span it, T is turned."""
    r, map = P.shape[1], s.get("map", s["transform"])
    one_block = map == "cayley_neumann" or map == "cayley" and not s.get("bound")
    require(one_block and theta.shape[1] == 1,
            f"peft has no such {s['transform']!r} on a support, only PSOFT's one block of Cayley's "
            "map, or of its series, which may be bounded")
    V = P.mT @ peft_support(W, r).to(P)            # P T Pᵀ = P' (VᵀTV) P'ᵀ for V = PᵀP'
    require((V.mT @ V - eye(V)).abs().max() <= 1e-3,
            "its support does not span W0's principal one, and peft's PSOFT knows no other")
    parts = {"psoft_R.weight": upper(V.mT @ skew(theta[0, 0], r) @ V)}
    bound = None if map == "cayley" else s.get("bound", 0.9)
    if s["scale"]:
        require((V.abs() - eye(V)).abs().max() <= 1e-3,
                "its scaling vectors belong to another basis of the principal support than peft's")
        parts["psoft_R.vector_a"], parts["psoft_R.vector_b"] = 1 + scale
    return dict(peft_type="PSOFT", r=r, psoft_mag_a=s["scale"], psoft_mag_b=s["scale"],
                cayley_neumann_eps=bound, **peft_series(map, s)), parts


# --------------------------------------------------------------------------------------------------
# Pieces of both

def size(theta):
    """b of b(b−1)/2 entries."""
    return round((1 + (1 + 8 * theta.shape[-1]) ** 0.5) / 2)


def upper(Q):
    """The strictly upper entries of Q (…, b, b), row by row."""
    i, j = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1)
    return Q[..., i, j]


def series(config):
    """(map, its options) of peft's configuration; 3 terms of its series are 4."""
    if not config["use_cayley_neumann"]:
        return "cayley", {}
    require(config.get("peft_version"), "peft before 0.18 (no version here) had another series")
    terms = config["num_cayley_neumann_terms"]
    return "cayley_neumann", dict(terms=4 if terms == 3 else terms)


def peft_series(map, s):
    terms = s.get("terms", 5)
    require(map == "cayley" or terms != 3, "peft has no series of 3 terms: its 3 means 4")
    return dict(use_cayley_neumann=map == "cayley_neumann", num_cayley_neumann_terms=terms)


def peft_support(W, r):
    """P (in, r) as peft computes it, which is not how loft.principal does for large weights."""
    return torch.linalg.svd(W.float(), full_matrices=False)[2][:r].mT
