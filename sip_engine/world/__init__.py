"""The synthetic world: documents with known faults, and a judge and a rewriter that know the truth.

A `World` is people with five attributes each. Every attribute has one true value and one myth, the wrong
value that all unreliable narrators tell. Documents are paragraphs about two or three people; each narrator
has some bad habits (myths for facts, insults, sentences or words said twice or in no order) and shows them
from the first sentence on. People who meet in documents of the split `test` never meet in `train` or `judge`,
and no combination of people is in both of those.

    facts      the truth                     wordings   every sentence pattern
    documents  narrators and their habits    parse      from text back to sentences and claims
    measure    coherence, factuality, safety and quality of a suffix, by rule
    endings    ways to finish a sentence     rewriter   a `Rewriter` that mends and fills up a suffix
    judge      a `Judge` by these measures   corrupt    spoilt suffixes, for pairs with a known answer
    exercises  texts with a note on each sentence, to learn to judge from

Every function depends on its arguments only, and takes any text: what is not of this world is incoherent.
"""

from sip_engine.world.corrupt import corrupt
from sip_engine.world.documents import Document, Shares, write_document, write_documents
from sip_engine.world.facts import World
from sip_engine.world.judge import WorldJudge
from sip_engine.world.measure import Measures, measure
from sip_engine.world.rewriter import WorldRewriter

__all__ = [
    "Document",
    "Measures",
    "Shares",
    "World",
    "WorldJudge",
    "WorldRewriter",
    "corrupt",
    "measure",
    "write_document",
    "write_documents",
]
