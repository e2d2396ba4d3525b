"""`sip data inspect`: what a config's documents hold, before anything is trained on them."""

from __future__ import annotations

from rich.table import Table

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import open_corpus
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import start_alone
from sip_engine.utils.progress import console


def describe_data(cfg: RunConfig, tokenizer: Tokenizer | None = None) -> None:
    """Build the token files and print counts and one sample. `tokenizer`: that of the checkpoint runs start from."""
    corpus = open_corpus(cfg, start_alone(), tokenizer)
    table = Table(show_header=False)
    rows = {
        "vocabulary": f"{corpus.tokenizer.vocab_size:,}",
        "samples an epoch": f"{corpus.num_samples:,}",
        "held-out samples": f"{len(corpus.held_out):,} used",
    }
    for part in corpus.parts:
        of = f" of {part.name}" if part.name else ""
        inventory = part.inventory
        rows |= {
            f"files{of}": str(inventory.read) if inventory else f"{len(part.files.prefixes)} .bin/.idx",
            **({f"passed over{of}": str(inventory.passed_over)} if inventory else {}),
            f"documents{of}": f"{part.files.num_documents:,}",
            f"skipped{of}": str(part.files.skips) or "none",
            f"tokens{of}": f"{part.files.num_tokens:,}",
            f"token files{of}": str(part.files.prefix_path),
        }
    rows |= {"note": "; ".join(note for part in corpus.parts for note in part.notes)}
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    sample = corpus.stream.samples_at(0, 1)[0]
    console.print(f"[bold]first prefix[/] (document {sample.document}, cut {sample.cut})", markup=True)
    console.print(sample.prefix[-400:])
    console.print("[bold]its suffix[/]", markup=True)
    console.print(sample.suffix[:400])
