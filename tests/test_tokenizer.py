"""Prompts as the paper's models saw them, stop ids, and the character tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from rljax.config import ConfigError
from rljax.tokenizer import character_tokenizer, load_tokenizer

GOLDEN = Path(__file__).resolve().parent / "golden" / "prompts.json"
INSTRUCT, BASE = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "You are a helpful assistant."
END, END_OF_TURN = 151643, 151645


@pytest.fixture(scope="module")
def instruct(shared_data):
    return load_tokenizer(shared_data / "qwen2.5_tokenizer")


@pytest.fixture(scope="module")
def base(shared_data, tmp_path_factory):
    """The base models' tokenizer: other default system text, other end."""
    folder = tmp_path_factory.mktemp("base")
    source = shared_data / "qwen2.5_tokenizer"
    (folder / "tokenizer.json").symlink_to(source / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"chat_template": config["chat_template"].replace(INSTRUCT, BASE), "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


# --------------------------------------------------------------------------------------------- the paper's prompts

LENGTHS = {  # rows, mean, median, p95, max, > 512, > 1024, > 2048; <= 512 with the instruct and the base system text
    "math__full_difficulty_ordered_test_500": (500, 145, 134, 242, 551, 1, 0, 0, 499, 499),
    "math__sampled_1_4_12800": (12800, 150, 137, 245, 1748, 43, 4, 0, 12757, 12759),
    "math__sampled_1_100_512": (512, 149, 137, 240, 668, 1, 0, 0, 511, 511),
    "online_eval/math__math_500": (500, 126, 105, 256, 846, 4, 0, 0, 496, 497),
    "online_eval/gsm8k": (1319, 121, 117, 165, 248, 0, 0, 0, 1319, 1319),
    "online_eval/aime2024": (30, 167, 150, 249, 453, 0, 0, 0, 30, 30),
    "online_eval/amc2023": (40, 140, 133, 244, 269, 0, 0, 0, 40, 40),
    "online_eval/stem__supergpqa_200": (200, 320, 264, 667, 1283, 26, 2, 0, 174, 177),
    "online_eval/codegen__humaneval_164": (164, 237, 218, 390, 505, 0, 0, 0, 164, 164),
    "online_eval/logic__zebra_puzzle_dataset_200": (200, 1330, 996, 3271, 3839, 141, 96, 52, 59, 60),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_prompt_lengths_are_the_papers(name, shared_data, instruct, base):
    """Base counts follow from the 72B scores, multiples of 1/497 and 1/177: only prompts of at most 512 tokens ran."""
    *expected, instruct_fits, base_fits = LENGTHS[name]
    prompts = parquet.read_table(shared_data / "guru_math" / f"{name}.parquet").column("prompt").to_pylist()
    n = np.array([len(instruct.encode_chat(prompt)) for prompt in prompts])
    over = [int((n > cap).sum()) for cap in (512, 1024, 2048)]
    assert [
        len(n),
        *(round(float(x)) for x in (n.mean(), np.median(n), np.percentile(n, 95), n.max())),
        *over,
    ] == expected
    # The two system texts differ by 10 tokens.
    assert ((n <= 512).sum(), (n - 10 <= 512).sum()) == (instruct_fits, base_fits)
    assert [len(base.encode_chat(prompt)) for prompt in prompts[:100]] == [x - 10 for x in n[:100]]


@pytest.mark.parametrize("kind", ["instruct", "base"])
def test_rendered_prompts_are_those_of_transformers(kind, request):
    tokenizer = request.getfixturevalue(kind)
    for case in json.loads(GOLDEN.read_text()):
        assert tokenizer.encode_chat(case["messages"], case["add_generation_prompt"]) == case[kind], case["messages"]


def test_layout_of_a_prompt(instruct):
    ids = instruct.encode_chat([{"role": "user", "content": "1+1?"}])
    text = f"<|im_start|>system\n{INSTRUCT}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert instruct.decode(ids, skip_special=False) == text
    assert instruct.decode([*instruct.encode(" a , b"), END_OF_TURN]) == " a , b"


# ---------------------------------------------------------------------------------------------------------- stop ids


def test_stop_ids_and_padding(instruct, base):
    assert instruct.stop_ids == (END_OF_TURN,) and instruct.pad_id == END
    assert base.stop_ids == (END,) and base.pad_id == END  # padding is the end token: masks must not look at ids
    assert instruct.vocab_size == 151665  # the models have 151936 or 152064 rows


def test_generation_config_decides_when_to_stop(tmp_path):
    character_tokenizer("ab").save(tmp_path)
    for written, expected in ((5, (5,)), ([5, 1], (5, 1)), (None, (1,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written, "top_p": 0.8}))
        assert load_tokenizer(tmp_path).stop_ids == expected
    assert load_tokenizer(tmp_path, stop_ids=[2]).stop_ids == (2,)
    with pytest.raises(ConfigError, match=r"stop ids \[7\] do not exist in the tokenizer .* which has 7 tokens"):
        load_tokenizer(tmp_path, stop_ids=[7])


# ------------------------------------------------------------------------------------------------------------ folders


def test_saved_tokenizer_is_the_same(instruct, tmp_path):
    instruct.save(tmp_path)
    again = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "∫ x² dx = 12,345.67 \n\n\t naïve 东京 <|im_end|> don't"}]
    assert again.encode_chat(messages) == instruct.encode_chat(messages)
    assert (again.stop_ids, again.pad_id, again.vocab_size) == (instruct.stop_ids, instruct.pad_id, instruct.vocab_size)


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder, and not a hub name"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_hub_failure_is_one_message(monkeypatch):
    import huggingface_hub

    def refuse(name, revision, allow_patterns):
        assert (name, revision) == ("Qwen/Qwen2.5-0.5B", "abc") and "*.bin" not in allow_patterns
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=r"'Qwen/Qwen2.5-0.5B' at revision 'abc' is not a folder here .*\(no route\)"):
        load_tokenizer("Qwen/Qwen2.5-0.5B", revision="abc")


def test_no_chat_template_is_an_error_when_used(tmp_path):
    character_tokenizer("ab").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [5, 6]
    with pytest.raises(ConfigError, match="has no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


# --------------------------------------------------------------------------------------------------------- characters


def test_character_tokenizer(tmp_path):
    built = character_tokenizer("0123456789+= \n")
    built.save(tmp_path)
    for tokenizer in (built, load_tokenizer(tmp_path)):
        # 0 <pad>, 1 <eos>, 2 <system>, 3 <user>, 4 <assistant>, 5.. the alphabet
        prompt = [{"role": "user", "content": "12+ 7=\n"}]
        assert tokenizer.encode_chat(prompt) == [3, 6, 7, 15, 17, 12, 16, 18, 4]
        answer = [*prompt, {"role": "assistant", "content": "19"}]
        assert tokenizer.encode_chat(answer, add_generation_prompt=False) == [*tokenizer.encode_chat(prompt), 6, 14, 1]
        assert tokenizer.decode([6, 14, 1]) == "19" and tokenizer.decode([6, 17, 14, 1], False) == "1 9<eos>"
        assert (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((1,), 0, 19)
        with pytest.raises(ConfigError, match="text 'x' cannot be encoded"):
            tokenizer.encode("x")
        with pytest.raises(ConfigError, match="refuses messages with roles"):
            tokenizer.encode_chat([{"role": "tool", "content": "1"}])


def test_character_alphabet_is_checked():
    for alphabet in ("aa", ["a", "bc"]):
        with pytest.raises(ConfigError, match="must be single characters, each once"):
            character_tokenizer(alphabet)
    with pytest.raises(ConfigError, match="must hold 'assistant'"):
        character_tokenizer("a", roles=("user",))


def test_importing_the_module_is_cheap():
    code = "import rljax.tokenizer, sys; print({'transformers', 'tokenizers', 'torch', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_making_a_tokenizer_says_nothing_and_needs_no_torch():
    code = "import sys; from rljax.tokenizer import *; character_tokenizer('ab'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
