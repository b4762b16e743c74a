#!/usr/bin/env bash
# Tests, measures and trains on a machine of which nothing is known but torch: bash run.sh MINUTES OUT
# All is in OUT/log.txt; weights in half precision come as OUT/weights.part* (at most 16 MiB each; `cat weights.part* > model.pt`),
# renewed every two minutes, so that a machine that is taken away leaves the newest.
set -uo pipefail
# CHECKS=no leaves tests and benchmarks out; VARIANT and SETTINGS choose the training.
MINUTES=${1:?run.sh MINUTES OUT}; mkdir -p "${2:?run.sh MINUTES OUT}"; OUT=$(cd "$2" && pwd)
KIT=$(cd "$(dirname "$0")" && pwd); WORK=$(mktemp -d); BEGIN=$SECONDS
VARIANT=${VARIANT:-release,finetune,muon}; SETTINGS=${SETTINGS:---batch_size 4 --learning_rate 0.001 --kernel_learning_rate 0.008 --epoch_length 500 --log_interval 20}
DEVICE=$(python3 -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")
exec > >(tee -a "$OUT/log.txt") 2>&1
say() { echo "[$((SECONDS - BEGIN)) s] $*"; }
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
say "kit: $(python3 -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")')"
if [ -d "$KIT/wheels" ]; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$WORK/site" "$KIT"/wheels/*.whl || exit 1
fi
python3 -c "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])" "$KIT/project.zip" "$WORK" || exit 1
mkdir -p "$WORK/bundle/models" && cp "$KIT/model.pt" "$WORK/bundle/models/"
export PYTHONPATH="$WORK/src:$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
python3 "$KIT/kit.py" "$KIT/subjects.tar" --output "$WORK/subjects" || exit 1
say "unpacked: $(ls -d "$WORK"/subjects/*/ | wc -l) subjects"
cd "$WORK" || exit 1

if [ "${CHECKS:-yes}" = yes ]; then  # a minute each
  say "tests marked gpu"
  timeout 90 python3 -m pytest -q -m gpu -p no:cacheprovider -o filterwarnings= tests/test_engines_optimizers.py tests/test_inferers.py tests/test_networks.py tests/test_sampling.py tests/test_synthesis.py 2>&1 | tail -15
  subject=$(ls -d subjects/*/ | head -1)
  say "benchmark of the generator"; timeout 45 python3 benchmarks/synthesis.py "$subject" --repeats 5 2>&1 | tail -20
  say "benchmark of the training step"; timeout 45 python3 benchmarks/training.py --repeats 5 2>&1 | tail -20
fi

# weights of the newest state, in half precision and in parts
keep() {
  python3 - "$WORK/training" "$WORK/half.pt" <<'P' && split -b 16000000 -d "$WORK/half.pt" "$OUT/.weights.part" && for part in "$OUT"/.weights.part*; do mv "$part" "$OUT/$(basename "$part" | cut -c2-)"; done
import sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
newest = sorted(folder.glob("training_checkpoint_*.pt"), key=lambda path: path.stat().st_mtime)
if not newest:
    sys.exit("no checkpoint yet")
average = torch.load(newest[-1], map_location="cpu", weights_only=True)["average"]
weights = {key.removeprefix("module."): value for key, value in average.items() if key.startswith("module.")}
torch.save({key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, sys.argv[2])
print("weights of", newest[-1].stem)
P
}

left=$(python3 -c "print(max(0.5, $MINUTES - ($SECONDS - $BEGIN) / 60 - 1))")  # a minute for the last weights
say "training for $left minutes: $VARIANT $SETTINGS"
# shellcheck disable=SC2086
python3 -m brainfm_monai train subjects/datalist.json --variant "$VARIANT" --weights bundle/models/model.pt --minutes "$left" \
  --max_epochs 1000 --checkpoint_iterations 250 --cache_device "$DEVICE" --output_dir "$WORK/training" $SETTINGS > "$OUT/training.txt" 2>&1 &
trainer=$!
( while sleep 120; do keep; done ) & keeper=$!
wait $trainer; status=$?
kill $keeper; wait $keeper 2>/dev/null
tail -30 "$OUT/training.txt"
keep; cp "$WORK/training"/train.log "$OUT/" 2>/dev/null
say "ended with exit status $status; $(ls "$OUT")"
exit $status
