"""`sip data`: what a config's documents hold, before anything is trained on them."""

from __future__ import annotations

from rich.table import Table

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import open_corpus
from sip_engine.data.inventory import take_inventory
from sip_engine.distributed.mesh import start_alone
from sip_engine.utils.progress import console


def describe_data(cfg: RunConfig) -> None:
    """Build the token files and print counts and one sample."""
    corpus = open_corpus(cfg, start_alone())
    files = corpus.files
    table = Table(show_header=False)
    rows = {
        "vocabulary": f"{corpus.tokenizer.vocab_size:,}",
        "samples an epoch": f"{corpus.num_samples:,}",
        "held-out samples": f"{len(corpus.held_out):,} used",
    }
    if files is not None:
        rows = {
            "files": str(take_inventory(corpus.train_path).read),
            "documents": f"{files.num_documents:,}",
            "skipped": str(files.skips) or "none",
            "tokens": f"{files.num_tokens:,}",
            **rows,
            "token files": str(files.prefix_path),
            **{f"note {number}": note for number, note in enumerate(corpus.notes, start=1)},
        }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    sample = corpus.stream.samples_at(0, 1)[0]
    console.print(f"[bold]first prefix[/] (document {sample.document}, cut {sample.cut})", markup=True)
    console.print(sample.prefix[-400:])
    console.print("[bold]its suffix[/]", markup=True)
    console.print(sample.suffix[:400])
