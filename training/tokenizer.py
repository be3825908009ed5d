"""The bundled model's tokenizer: one token per character, no special handling of words or blanks."""

from __future__ import annotations

import string
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

PAD: Final = "<pad>"
EOS: Final = "<eos>"
UNK: Final = "<unk>"
VOCAB_SIZE: Final = 128

# The model is single-turn: only the latest user message counts, rendered to the text of a completion prompt plus
# the blank that every answer starts with, so that the reply of a chat starts at its first visible character.
CHAT_TEMPLATE: Final = """\
{%- set ns = namespace(text='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- if message['content'] is string -%}
      {%- set ns.text = message['content'] -%}
    {%- else -%}
      {%- set ns.text = message['content'] | map(attribute='text') | join(' ') -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- set ns.text = ns.text | trim -%}
{{- ns.text if ns.text.endswith('=') else ns.text + ' =' -}}
{%- if add_generation_prompt -%}
  {{- ' ' -}}
{%- elif messages[-1]['role'] == 'assistant' -%}
  {{- ' ' + messages[-1]['content'] + '<eos>' -}}
{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: three special tokens, then the lower-case printable ASCII characters."""
    characters = [c for c in map(chr, range(32, 127)) if c not in string.ascii_uppercase] + ["\n"]
    vocab = {token: i for i, token in enumerate([PAD, EOS, UNK, *characters])}
    # BPE without merges splits text into characters, and needs no pre-tokenizer to do so.
    core = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=UNK))
    core.normalizer = Lowercase()
    core.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
