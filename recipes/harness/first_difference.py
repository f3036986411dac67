"""Tells of generated texts that differ how near the model was to a tie where they part.

    python first_difference.py MODEL_DIR --pairs PAIRS.jsonl --out FILE.jsonl

A line of PAIRS has `index`, `prompt`, `harness` and `tailorq` (the two completions). The prompt with what both texts have in
common is read by transformers in f64, and the line gets both next tokens and their logits there.
"""

import argparse
import json
import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def parting(tokenizer, pair):
    """The tokens before the texts part, and the next one of each text (the end token where one stops)."""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    both = [prompt + tokenizer(pair[side])["input_ids"] + [tokenizer.eos_token_id] for side in ("harness", "tailorq")]
    at = next(i for i, (ours, theirs) in enumerate(zip(*both)) if ours != theirs)
    return both[0][:at], both[0][at], both[1][at], at - len(prompt)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float64).eval()
    with open(arguments.pairs, encoding="utf-8") as pairs, open(arguments.out, "w", encoding="utf-8") as out:
        for pair in map(json.loads, pairs):
            before, theirs, ours, generated = parting(tokenizer, pair)
            with torch.no_grad():
                logits = model(torch.tensor([before]), logits_to_keep=1).logits[0, -1]
            top = torch.topk(logits, 2)
            told = {
                "index": pair["index"],
                "tokens_in_common": generated,
                "harness": [tokenizer.decode([theirs]), float(logits[theirs])],
                "tailorq": [tokenizer.decode([ours]), float(logits[ours])],
                "gap": abs(float(logits[theirs] - logits[ours])),
                "top": [[tokenizer.decode([int(i)]), float(v)] for v, i in zip(*top)],
            }
            out.write(json.dumps(told, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
