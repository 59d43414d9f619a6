"""Tasks of lm-evaluation-harness over local JSON files, one of each kind of request, and a tiny checkpoint for them."""

import json
import random
from pathlib import Path

WORDS = (
    "the a quick brown fox jumps over lazy dogs and cats who sleep in sunny gardens while rain falls on roofs".split()
)
CONTEXT = 64  # tokens; some prompts below are longer
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
fewshot_split: train
num_fewshot: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "letters": """
output_type: multiple_choice
doc_to_text: "{{question}} \\nAnswer: "
doc_to_choice: ["A", "B", "C"]
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def write(folder: Path, documents: int = 14) -> Path:
    """folder/*.yaml and their data; the questions are of all lengths up to more than the context."""
    folder.mkdir(parents=True)
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    rows = [
        {
            "question": text(2 + 2 * i).capitalize() + draw.choice([".", " ", ":", ""]),
            "choices": [text(1 + (i + k) % 4) for k in range(3)],
            "label": draw.randrange(3),
            "text": text(1 + 3 * i) + "\n  and é漢\n",
        }
        for i in range(documents)
    ]
    for split, kept in (("train", rows[:3]), ("test", rows)):
        (folder / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for name, body in TASKS.items():
        files = {split: str(folder / f"{split}.json") for split in ("train", "test")}
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {json.dumps({'data_files': files})}\n"
        (folder / f"{name}.yaml").write_text(head + "test_split: test\n" + body.lstrip() + "metadata: {version: 1.0}\n")
    group = "group: local\ntask: [local_choices, local_letters]\naggregate_metric_list:\n  - {metric: acc}\n"
    (folder / "group.yaml").write_text(group)
    return folder


def checkpoint(path: Path, *, marks: str = "bos", scale: float = 2.0):
    """path: a checkpoint of a random model with a tokenizer of its own; -> (its config, its parameters)."""
    import jax

    from tinyllama_jax.config import Model
    from tinyllama_jax.configio import to_dict
    from tinyllama_jax.data.tokenizer import train_bpe
    from tinyllama_jax.model import transformer
    from tinyllama_jax.train.checkpoint import save_params

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(WORDS), "Answer: A B C", ". : ;"] * 30
    tokenizer = train_bpe(["\n".join(lines)], 320, path.parent / "tokenizer.model")
    model = Model(
        vocab_size=320, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=48, context_tokens=CONTEXT
    )
    params = transformer.init(model, jax.random.key(3))
    # So that no two tokens are nearly as likely, and it writes words: programs do not agree on how to show bytes that
    # form no character.
    params = jax.tree.map(lambda p: p * scale if p.ndim > 1 else p, params)
    params["head"]["kernel"] = params["head"]["kernel"].at[:, :259].multiply(0.05)
    meta = {"step": 7, "tokens": 7000, "model": to_dict(model), "document_marks": marks}
    save_params(path, params, meta, [tokenizer])
    return model, params
