"""The demo model, SmolLM2-135M-Instruct: our GGUF conversion and our sampler against transformers."""

import copy
import re

import jax
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rljax.config import MeshConfig
from rljax.mesh import make_mesh
from rljax.models import hf
from rljax.models.gguf import convert_gguf, demo_gguf
from rljax.sampling.engine import Sampler
from rljax.tokenizer import load_tokenizer
from rljax.types import Prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    destination = tmp_path_factory.mktemp("smollm2") / "m"
    convert_gguf(demo_gguf(), destination)
    return destination


@pytest.fixture(scope="module")
def questions(shared_data) -> list[list[dict[str, str]]]:
    return parquet.read_table(shared_data / "gsm8k" / "test.parquet").column("prompt").to_pylist()


@pytest.fixture(scope="module")
def theirs():
    file = demo_gguf()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    return model, tokenizer


def test_weights_are_those_transformers_reads_from_the_file(folder, theirs):
    converted, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, expected = converted.state_dict(), theirs[0].state_dict()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    assert converted.config.rms_norm_eps == pytest.approx(theirs[0].config.rms_norm_eps, rel=1e-7)  # 1e-5 in float32
    for field in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        assert getattr(converted.config, field) == getattr(theirs[0].config, field), field


def test_tokenizer_gives_the_same_ids(folder, theirs, questions):
    """transformers knows no rule for `tokenizer.ggml.pre = smollm` and cuts as GPT-2 does, without taking each digit on
    its own first, as llama.cpp does. The model was trained with digits apart: no token of its vocabulary joins one to
    anything. 15 of the 1,319 prompts tell the rules apart: two spaces before a digit, or a fraction such as ¾.
    """
    ours, tokenizer = load_tokenizer(folder), theirs[1]
    again = AutoTokenizer.from_pretrained(folder)  # the exported files, opened by transformers
    digits_first = copy.deepcopy(tokenizer)
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    digits_first.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    assert not [token for token in tokenizer.get_vocab() if re.search(r"\d", token) and len(token) > 1]
    differ = []
    for messages in questions:
        ids = ours.encode_chat(messages)
        for other in (again, digits_first):
            assert list(other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]) == ids
        if list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]) != ids:
            differ.append(messages[0]["content"])
        assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(differ) == 15 and all(re.search(r"  \d|¾", text) for text in differ)


def test_greedy_continuations_are_the_same(folder, theirs, questions):
    """64 tokens of 20 prompts, sampled together by us, scored one by one by torch."""
    model, tokenizer, steps = theirs[0], load_tokenizer(folder), 64
    ids = [tokenizer.encode_chat(messages) for messages in questions[:20]]
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, length, prompt in zip(tokens, lengths, ids, strict=True):
        row[:length] = prompt
    prompts = Prompts(tokens, lengths, np.arange(len(ids)), records=(None,) * len(ids))  # type: ignore[arg-type]

    arch = hf.read_architecture(folder)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    sampler = Sampler(None, arch, mesh, stop_ids=tokenizer.stop_ids)
    sampler.sync(hf.load_params(folder, arch))
    drawn = sampler.generate(prompts, 1, key=jax.random.key(0), temperature=0.0, max_completion_tokens=steps)

    for prompt, ours, length in zip(ids, drawn.tokens, drawn.lengths, strict=True):
        completion = ours[:length].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0]
        # Each token is torch's first choice after the tokens before it: so greedy decoding by torch draws the same.
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == completion
        assert length == steps or completion[-1] in tokenizer.stop_ids
        assert not set(completion[:-1]) & set(tokenizer.stop_ids)
