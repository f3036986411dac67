"""Runs lm-evaluation-harness and tailorq on the same model and the same items, and prints where they differ and their times.

    python agree.py MODEL.gguf --data DIR --work WORK --tasks arc_easy,winogrande,mmlu:5,gsm8k

`mmlu:5` is MMLU with five examples. Both run in f32 on the same processors, one after the other. What is finished stands in
WORK and is not run again. Start it under `taskset -c 0,1` to hold both to two cores.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

from convert import convert

HERE = pathlib.Path(__file__).parent


def read(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def script(name, *arguments):
    subprocess.run([sys.executable, str(HERE / name), *map(str, arguments)], check=True)


def directory(options):
    """Where the model stands as transformers opens it."""
    return pathlib.Path(options.work) / "models" / pathlib.Path(options.model).stem


def ask_harness(options, runs):
    """Asks the harness what it has not yet been asked: one process for each batch size, since it opens the model."""
    for batch in options.batch.split(","):
        left = [run.spec for run in runs if not (run.folder / f"harness-{batch}.json").exists()]
        if left:
            script(
                "ask_harness.py", directory(options), "--data", options.data, "--tasks", ",".join(left),
                "--items", options.items, "--threads", options.threads, "--batch", batch,
                "--device", options.device, "--out", runs[0].folder.parent,
            )


def processor_seconds():
    """Of all processes that ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Run:
    """One task of one model by both programs."""

    def __init__(self, options, spec):
        self.options = options
        self.spec = spec
        self.task, _, self.shots = spec.partition(":")
        self.folder = pathlib.Path(options.work) / pathlib.Path(options.model).stem / spec.replace(":", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.directory = directory(options)

    def harness(self):
        """What the harness says of each item; the quickest of the batch sizes counts."""
        logs = [self.folder / f"harness-{batch}.jsonl" for batch in self.options.batch.split(",")]
        told = [(json.loads(log.with_suffix(".json").read_text()), log) for log in logs]
        best, log = min(told, key=lambda one: one[0]["seconds"])
        return best, read(log)

    def tailorq(self):
        out, log = self.folder / "tailorq.json", self.folder / "tailorq.jsonl"
        if not out.exists():
            shots = ["--num-fewshot", self.shots] if self.shots else []
            command = [
                self.options.tailorq, "eval", self.options.model, "--tasks", self.task, "--data", self.options.data,
                "--limit", self.options.items, "--threads", self.options.threads, "--device", self.options.device,
                "--json", "--quiet", "--log-samples", log, *shots,
            ]
            before = processor_seconds()
            done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
            told = dict(json.loads(done.stdout), processor_seconds=processor_seconds() - before)
            out.write_text(json.dumps(told))
        return json.loads(out.read_text()), read(log)

    def row(self):
        theirs, their_lines = self.harness()
        ours, our_lines = self.tailorq()
        if [line["index"] for line in their_lines] != [line["index"] for line in our_lines]:
            raise SystemExit(f"{self.spec}: the programs scored different items")
        generated = "completion" in our_lines[0]
        compare = self.of_texts if generated else self.of_choices
        row = {
            "model": pathlib.Path(self.options.model).stem,
            "task": self.spec,
            "items": len(our_lines),
            **compare(their_lines, our_lines),
            "batch": theirs["batch"],
            "harness_seconds": theirs["seconds"],
            "tailorq_seconds": ours["seconds"][self.task],
            "harness_processor_seconds": theirs["processor_seconds"],
            "tailorq_processor_seconds": ours["processor_seconds"],
        }
        row["times_faster"] = row["harness_seconds"] / row["tailorq_seconds"]
        (self.folder / "row.json").write_text(json.dumps(row, indent=1, ensure_ascii=False))
        return row

    def of_choices(self, theirs, ours):
        largest, differing = 0.0, []
        for their, our in zip(theirs, ours):
            pairs = list(zip(their["loglikelihoods"], our["loglikelihoods"], strict=True))
            largest = max(largest, *(abs(a - b) for a, b in pairs))
            norm = "acc_norm" in their["correct"] and their["correct"]["acc_norm"] != our["acc_norm"]
            if their["prediction"] != our["prediction"] or their["gold"] != our["gold"] or norm:
                differing.append({"index": our["index"], "harness": their, "tailorq": our})
        same = sum(their["prediction"] == our["prediction"] for their, our in zip(theirs, ours))
        return {"same_predictions": same, "largest_difference": largest, "differences": differing}

    def of_texts(self, theirs, ours):
        pairs, differing_scores = [], []
        for their, our in zip(theirs, ours):
            if their["completion"] != our["completion"]:
                both = {"harness": their["completion"], "tailorq": our["completion"]}
                pairs.append({"index": our["index"], "prompt": their["prompt"], **both})
            scores = {name: our[f"exact_match,{name}"] for name in their["correct"]}
            if scores != their["correct"]:
                differing_scores.append({"index": our["index"], "harness": their["correct"], "tailorq": scores})
        told = []
        if pairs:
            write(self.folder / "pairs.jsonl", pairs)
            out = self.folder / "differences.jsonl"
            script(
                "first_difference.py", self.directory, "--pairs", self.folder / "pairs.jsonl",
                "--threads", self.options.threads, "--out", out,
            )
            told = read(out)
        same = len(ours) - len(pairs)
        return {"same_texts": same, "differences": told, "differing_scores": differing_scores}


def table(rows):
    lines = [
        "| model | task | items | same | largest difference, nats | harness, s (batch) | tailorq, s | times faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        same = row.get("same_predictions", row.get("same_texts"))
        largest = f"{row['largest_difference']:.1e}" if "largest_difference" in row else "-"
        lines.append(
            f"| {row['model']} | `{row['task']}` | {row['items']} | {same} | {largest} "
            f"| {row['harness_seconds']:.1f} ({row['batch']}) | {row['tailorq_seconds']:.1f} | {row['times_faster']:.1f} |"
        )
    for row in rows:
        for difference in row["differences"] + row.get("differing_scores", []):
            lines.append(f"\n{row['model']}, {row['task']}: {json.dumps(difference, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--data", required=True, help="folder of data sets, as of `tailorq eval --data`")
    parser.add_argument("--work", required=True, help="folder for what is finished")
    parser.add_argument("--tasks", default="arc_easy,piqa,winogrande,hellaswag,boolq,mmlu,mmlu:5,gsm8k,gsm8k_cot")
    parser.add_argument("--tailorq", default="tailorq", help="the program")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", default="16", help="batch sizes of the harness, of which the quickest counts")
    parser.add_argument("--device", default="cpu", help="of both: cpu or cuda:0")
    options = parser.parse_args()

    runs = [Run(options, spec) for spec in options.tasks.split(",")]
    convert(options.model, directory(options))
    ask_harness(options, runs)
    rows = []
    for run in runs:
        rows.append(run.row())
        print(table(rows[-1:]), flush=True)
    told = table(rows)
    (pathlib.Path(options.work) / f"{pathlib.Path(options.model).stem}.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
