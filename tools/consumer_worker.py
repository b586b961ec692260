"""Asks another program for log-probabilities and greedy tokens of a model, in that program's environment.

check_consumers.py runs it. Standard input: {"program", "model", "sequences": [[prompt, answer], ...], "num_new"}, in
token ids. Standard output: a line of JSON, {"version", "logps": an answer's sum in nats each, "tokens": a greedy answer
to each prompt}.
"""

import contextlib
import json
import sys
from importlib.metadata import version


def llama_cpp(model: str, sequences: list, num_new: int) -> dict:
    """A GGUF file, on one CPU thread, with a cache of keys and values in float32."""
    import numpy
    from llama_cpp import GGML_TYPE_F32, Llama

    longest = max(len(prompt) + max(len(answer), num_new) for prompt, answer in sequences)
    how = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "flash_attn": False, "n_threads": 1, "n_threads_batch": 1}
    llm = Llama(model_path=model, n_ctx=longest + 8, logits_all=True, verbose=False, **how)
    logps, tokens = [], []
    for prompt, answer in sequences:
        llm.reset()
        llm.eval(prompt + answer)
        logits = llm.scores[: len(prompt) + len(answer)].astype(numpy.float64)
        rows = logits[len(prompt) - 1 : -1]
        peak = rows.max(-1, keepdims=True)
        log_sum = (peak + numpy.log(numpy.exp(rows - peak).sum(-1, keepdims=True)))[:, 0]
        logps.append(float((rows[numpy.arange(len(answer)), answer] - log_sum).sum()))
        llm.reset()
        llm.eval(prompt)
        found = []
        for _ in range(num_new):
            found.append(int(llm.scores[llm.n_tokens - 1].argmax()))
            llm.eval(found[-1:])
        tokens.append(found)
    return {"version": version("llama_cpp_python"), "logps": logps, "tokens": tokens}


def vllm(model: str, sequences: list, num_new: int) -> dict:
    """A folder, in float32, without a compiler."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True)
    scored = llm.generate(
        [{"prompt_token_ids": prompt + answer} for prompt, answer in sequences],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False),
    )
    logps = []
    for (prompt, answer), out in zip(sequences, scored, strict=True):
        of_tokens = out.prompt_logprobs[len(prompt) :]
        logps.append(sum(one[token].logprob for one, token in zip(of_tokens, answer, strict=True)))
    how = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True, detokenize=False)
    asked = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in sequences], how)
    return {"version": version("vllm"), "logps": logps, "tokens": [list(out.outputs[0].token_ids) for out in asked]}


def sentencepiece(model: str, vocab_size: int, text: str) -> dict:
    """Trains a tokenizer of so many pieces: converters want one that they know."""
    from sentencepiece import SentencePieceTrainer

    how = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(input=text, model_prefix=model, vocab_size=vocab_size, **how)
    return {"version": version("sentencepiece")}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    programs = {"llama_cpp": llama_cpp, "vllm": vllm, "sentencepiece": sentencepiece}
    with contextlib.redirect_stdout(sys.stderr):
        answered = programs[asked.pop("program")](**asked)
    print(json.dumps(answered))
