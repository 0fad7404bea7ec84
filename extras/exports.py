"""A model of ours in one file of safetensors: weights, VAE, tokenizer and configuration.

The format is that of the library `safetensors`, which reads these files: eight bytes that say how long the
header is, the header in JSON, then the tensors' bytes. Reading and writing it needs no package.
"""

import json
from dataclasses import asdict, replace

import numpy as np
import torch

from extras.runs import check_sizes, opening, written

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path, keep=lambda name: True):
    """A file of safetensors -> its tensors whose names pass `keep`, on the CPU, and its texts: two dicts.

    Raises ValueError, naming the file, if it is none, or is cut short.
    """
    with opening(path, "a safetensors file, or is truncated"):
        content = torch.from_numpy(np.memmap(path, np.uint8, "c"))
        start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
        header = json.loads(content[8:start].numpy().tobytes())
        texts, tensors = header.pop("__metadata__", {}), {}
        for name in filter(keep, header):
            begin, end = header[name]["data_offsets"]
            data = content[start:][begin:end].clone()  # aligned, and no longer the file's
            if len(data) != end - begin:
                raise ValueError(f"{name} is cut short")
            tensors[name] = data.view(DTYPES[header[name]["dtype"]]).view(header[name]["shape"])
    return tensors, texts


def write_safetensors(path, tensors, texts=None):
    """The inverse. Raises OSError if the file cannot be written."""
    header, parts, end = {"__metadata__": texts or {}}, [], 0
    for name, value in tensors.items():
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        header[name] = dict(dtype=NAMES[value.dtype], shape=list(value.shape))
        header[name] |= dict(data_offsets=[end, end + len(data)])
        parts.append(data)
        end += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the data are aligned
    with written(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for data in parts:
            file.write(data)


def export(trained, path, half=False):
    """Write all that sampling needs, for `sample.load`. half: the matrices in float16.

    Raises ValueError if the path does not end in .safetensors, OSError if it cannot be written.
    """
    if not str(path).endswith(".safetensors"):
        raise ValueError(f"--export {path}: name a file that ends in .safetensors")
    parts = dict(model=trained.model.config, diffusion=trained.ddpm.config, data=trained.data)
    parts |= dict(sampling=trained.sampling, extra=replace(trained.extra, cache=""))  # that of this machine
    state = dict(config={name: asdict(part) for name, part in parts.items()})
    state |= dict(vae_config=asdict(trained.vae.config), tokenizer=trained.tokenizer.state())
    tensors = {}
    for part, network in (("ema", trained.model), ("vae", trained.vae)):
        for name, value in network.state_dict().items():
            tensors[f"{part}.{name}"] = value.half() if half and value.ndim > 1 else value
    write_safetensors(path, tensors, {"transfusion": json.dumps(state)})


def read_export(path):
    """What `export` wrote, as a checkpoint holds it. Raises ValueError, naming the file, if it is another."""
    tensors, texts = read_safetensors(path)
    with opening(path, "a model that sample.py --export wrote"):
        state = json.loads(texts["transfusion"])
        for part in ("ema", "vae"):
            found = {name: value for name, value in tensors.items() if name.startswith(f"{part}.")}
            state[part] = {name.removeprefix(f"{part}."): value for name, value in found.items()}
    check_sizes(state, path)
    return state
