#!/usr/bin/env python3
"""Writes the items of Spider and MMLU as conversations, for calibration and for `completion_nll`.

    python3 recipes/messages.py DATA

reads DATA/spider/{calib,test}.jsonl with DATA/spider/tables.json, and DATA/mmlu/{calib,test}.jsonl, and writes
{calib,test}.messages.jsonl beside them. Spider's prompts are those of `tailorq eval --tasks spider`; an answer of MMLU is the
letter and the text of the right choice, so that there is more than one token to learn from.
"""

import json
import pathlib
import sys

INSTRUCTION = "Answer with one SQLite query only, without any explanation."


def schemas(folder):
    found = {}
    for table in json.loads((folder / "tables.json").read_text()):
        columns = [[] for _ in table["table_names_original"]]
        for of_table, name in table["column_names_original"]:
            if of_table >= 0:
                columns[of_table].append(name)
        pairs = zip(table["table_names_original"], columns)
        found[table["db_id"]] = "".join(f"# {name}({', '.join(names)});\n" for name, names in pairs)
    return found


def spider(row, schema):
    question = schema[row["db_id"]] + row["question"].strip() + "\n### SQL:"
    return [("system", INSTRUCTION), ("user", question), ("assistant", row["query"].strip())]


def mmlu(row, _):
    letters = "ABCD"
    choices = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"])]
    question = "\n".join([row["question"].strip(), *choices, "Answer with the letter and the text of the right option."])
    return [("user", question), ("assistant", choices[int(row["answer"])])]


def main():
    data = pathlib.Path(sys.argv[1])
    for name, turns in (("spider", spider), ("mmlu", mmlu)):
        known = schemas(data / name) if name == "spider" else None
        for part in ("calib", "test"):
            lines = filter(None, (data / name / f"{part}.jsonl").read_text().split("\n"))
            with open(data / name / f"{part}.messages.jsonl", "w") as out:
                for row in map(json.loads, lines):
                    messages = [{"role": role, "content": content} for role, content in turns(row, known)]
                    out.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
