#!/usr/bin/env python3
"""Make the demo checkpoint from nothing but two Debian packages: a 3.6M-parameter Llama that continues English text.

    apt-get install bible-kjv dict-jargon          # the King James Bible and the Jargon File, both in the public domain
    python train.py prepare                        # -> .work/corpus.txt, tokenizer.json, tokenizer_config.json, words.txt.gz
    python train.py train                          # -> config.json, model.safetensors, generation_config.json
    python train.py check                          # samples text, counts how many of its words occur in the corpus

Needs torch, transformers and tokenizers. Train on a CUDA device if there is one (minutes; on a CPU it takes days).
"""

import argparse
import copy
import gzip
import json
import math
import os
import re
import subprocess
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
BOS, EOS = "<s>", "</s>"  # token IDs 0 and 1
DOC_END = "\f\n"  # separates documents in corpus.txt; becomes EOS in the token stream
VALIDATION_EVERY = 25  # every 25th document is held out

# ---- prepare: the corpus, the tokenizer, the word list ---------------------------------------------------------------


def bible() -> Iterator[str]:
    """One document per chapter: 'Genesis 1', then one verse per line, without its number."""
    text = subprocess.run(["bible", "-l9999", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    for heading, verses in re.findall(r"^(\w[\w ]*)\n\n((?: +\d+ .*\n)+)", text, re.M):
        yield heading + "\n" + re.sub(r"^ +\d+ ", "", verses, flags=re.M).strip()


def jargon(path: Path) -> Iterator[str]:
    """One document per entry: 'hack, n.', then one paragraph per line. No pronunciations, tables, pictures, addresses."""
    text = gzip.decompress(path.read_bytes()).decode()  # dictzip is gzip with an index in its header
    text = re.sub("[“”]", '"', re.sub("[‘’]", "'", re.sub(r"([“‘{])\s+|\s+([”’}])", r"\1\2", text)))
    text = unicodedata.normalize("NFKC", text.replace("\u00ad", "")).replace("{", "").replace("}", "")
    # A headword stands unindented after a blank line; the next line is indented by one (sound, part of speech) or blank.
    for entry in re.split(r"\n\n(?=\S.*\n(?: \S|\n))", text)[1:]:
        head, kind, *body = entry.split("\n")
        kind = re.sub(r"/.*/", "", kind).strip(" ,/")
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", "\n".join(body))]
        prose = [p for p in paragraphs if len(re.findall(r"[A-Za-z ,.]", p)) > 0.9 * len(p) and "://" not in p]
        if prose and not head.startswith("00-database"):
            yield "\n".join([f"{head}, {kind}" if kind else head, *prose])


def words(text: str) -> list[str]:
    """Runs of letters and apostrophes, lower case, without apostrophes at the ends (there they are quotation marks)."""
    return [w for run in re.findall(r"[A-Za-z']+", text) if (w := run.lower().strip("'"))]


def prepare(args: argparse.Namespace) -> None:
    documents = [*bible(), *jargon(args.jargon)]
    corpus = DOC_END.join(documents)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "corpus.txt").write_text(corpus)
    known = "\n".join(sorted(set(words(corpus)))) + "\n"
    (args.out / "words.txt.gz").write_bytes(gzip.compress(known.encode(), 9, mtime=0))

    # Byte-level BPE: its alphabet is the 256 bytes, so that any text at all survives encode and decode.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((d for i, d in enumerate(documents) if i % VALIDATION_EVERY), trainer)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    # No chat model: a conversation is the text of its messages, one after the other, to be continued.
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
                "model_max_length": 2048, "clean_up_tokenization_spaces": False, "chat_template": template}  # fmt: skip
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{len(documents)} documents, {len(corpus.encode())} bytes, {known.count(chr(10))} words")


# ---- train -----------------------------------------------------------------------------------------------------------


def token_stream(tokenizer: Tokenizer, documents: list[str], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All documents as one line of token IDs, each closed by EOS, and the positions at which a line of text begins."""
    ids = [t for e in tokenizer.encode_batch(documents, add_special_tokens=False) for t in (*e.ids, 1)]
    stream = torch.tensor(ids, device=device)
    newline = tokenizer.encode("\n", add_special_tokens=False).ids[0]
    begins = ((stream == newline) | (stream == 1)).nonzero().flatten() + 1
    return stream, F.pad(begins[:-1], (1, 0))  # position 0 begins a line, too


def batch(stream: torch.Tensor, starts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that begin at `starts`: inputs [B, T] (BOS, then all tokens but the last) and targets [B, T]."""
    targets = stream[starts[:, None] + torch.arange(length, device=stream.device)]
    return F.pad(targets[:, :-1], (1, 0), value=0), targets


def loss_of(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Nats per token over the whole stream, cut into rows; a last, shorter row is left out."""
    starts = torch.arange(0, len(stream) - length + 1, length, device=stream.device)
    model.eval()
    total = sum(loss_of(model, *batch(stream, rows, length), "sum").item() for rows in starts.split(16))
    model.train()
    return total / (len(starts) * length)


def train(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs bandwidth
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    documents = (args.work / "corpus.txt").read_text().split(DOC_END)
    held_out = documents[::VALIDATION_EVERY]
    seen = [d for i, d in enumerate(documents) if i % VALIDATION_EVERY]
    stream, begins = token_stream(tokenizer, seen, device)
    begins = begins[begins <= len(stream) - args.context]
    validation, _ = token_stream(tokenizer, held_out, device)
    bytes_per_token = sum(len(d.encode()) for d in held_out) / len(validation)

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32, num_key_value_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    # Llama has no dropout of its own. So small a corpus needs it: on what each block adds to the residual stream.
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, out: F.dropout(out, args.dropout, m.training))
    compiled = torch.compile(model) if args.compile else model
    print(
        f"{device}; {model.num_parameters()} parameters; {len(stream)} tokens to train on, {len(validation)} held out"
    )

    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() < 2]  # of the norms: no weight decay, it would pull them to zero
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    best, began = math.inf, time.time()
    for step in range(args.steps):
        # Linear warm-up, then half a cosine down to 2%.
        progress = max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup))
        rate = args.lr * min(1.0, (step + 1) / args.warmup) * (0.51 + 0.49 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Rows begin where lines do, as prompts will: after BOS there is always the beginning of a line.
        starts = begins[torch.randint(len(begins), (args.batch,)).to(device)]
        loss = loss_of(compiled, *batch(stream, starts, args.context), "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            held = evaluate(model, validation, args.context)
            epochs = (step + 1) * args.batch * args.context / len(stream)
            print(f"step {step + 1} epoch {epochs:.1f} loss {loss.item():.4f} validation {held:.4f} "
                  f"({held / math.log(2) / bytes_per_token:.4f} bits/byte) {time.time() - began:.0f}s", flush=True)  # fmt: skip
            if held < best:
                best = held
                copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)

    model = (
        LlamaForCausalLM.from_pretrained(args.out).float().to(device)
    )  # measures what was saved: the weights' bf16 values
    for name, texts in (
        ("train", seen[::VALIDATION_EVERY]),
        ("validation", held_out),
    ):  # as much of the one as of the other
        tokens, _ = token_stream(tokenizer, texts, device)
        nats = evaluate(model, tokens, args.context)
        bits = nats / math.log(2) * len(tokens) / sum(len(d.encode()) for d in texts)
        print(f"saved model, {name}: {nats:.4f} nats/token, {bits:.4f} bits/byte")
    path = args.out / "config.json"  # readers older than transformers 5 look for rope_theta at the top
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 10000.0}, indent=2, sort_keys=True) + "\n")


# ---- check -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check(args: argparse.Namespace) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out).float().eval()
    model.generation_config.eos_token_id = None  # go on after the end of a document, as in training
    known = set(gzip.decompress((args.out / "words.txt.gz").read_bytes()).decode().split())
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        ids = tokenizer(args.prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=True, temperature=args.temperature, top_p=0.95, top_k=0,
                             max_new_tokens=1000)[0, ids.shape[1] :]  # fmt: skip
        text = tokenizer.decode(out).replace(EOS, "\n\n")
        found = words(text)[1:-1]  # the first and the last may be parts of words
        odd = [w for w in found if w not in known]
        print(
            f"seed {seed}: {1 - len(odd) / len(found):.2%} of {len(found)} words occur in the corpus; not: {odd[:12]}"
        )
        if seed == 0:
            print(args.prompt + text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True, metavar="prepare | train | check")
    for step in (prepare, train, check):
        p = steps.add_parser(step.__name__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(step=step)
        p.add_argument("--out", type=Path, default=HERE, help="the checkpoint's directory")
        p.add_argument("--work", type=Path, default=HERE / ".work", help="where corpus.txt lies")
        if step is prepare:
            p.add_argument("--jargon", type=Path, default=Path("/usr/share/dictd/jargon.dict.dz"))
            p.add_argument("--vocab-size", type=int, default=3072)
        elif step is train:
            for name, value in {"hidden": 256, "intermediate": 512, "layers": 5, "context": 2048, "batch": 16,
                                "steps": 4000, "warmup": 100, "lr": 3e-3, "weight-decay": 0.5, "dropout": 0.25,
                                "eval-every": 500, "seed": 1}.items():  # fmt: skip
                p.add_argument(f"--{name}", type=type(value), default=value)
            p.add_argument("--compile", action="store_true", help="torch.compile the training step")
        else:
            p.add_argument("--seeds", type=int, default=5)
            p.add_argument("--temperature", type=float, default=0.8)
            p.add_argument("--prompt", default="In the beginning")
    args = parser.parse_args()
    args.step(args)


if __name__ == "__main__":
    main()
