"""A few samples of the benchmarks that are published as parquet files, in each layout that is read."""

import base64
import io
import json

import pyarrow
import pyarrow.parquet
from PIL import Image

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def jpeg(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 99, 5)).save(buffer, "JPEG")
    return buffer.getvalue()


def parquet(path, rows):
    """Rows as a parquet file; a number in a column `image...` is an image of that shade."""
    columns = {}
    for name in rows[0]:
        cells = [row[name] for row in rows]
        if name.startswith("image") and name != "image_path":
            cells = [None if c is None else {"bytes": jpeg(c), "path": None} for c in cells]
            columns[name] = pyarrow.array(cells, IMAGE)
        else:
            columns[name] = cells
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def ai2d(folder):
    rows = [
        {
            "question": f"Which part {i}?",
            "options": ["sun", "sea", "sky", "sand"],
            "answer": str(i),
            "image": i,
        }
        for i in range(4)
    ]
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return ["A", "b.", "C. sky", "The answer is D"], 3 / 4


def mmstar_rows():
    kinds = [("math", "geometry"), ("math", "geometry"), ("math", "statistics"), ("reasoning", "diagrams")]
    return [
        {
            "index": i, "question": f"Which {i}?\nOptions: A: one, B: two, C: three, D: four", "image": i,
            "answer": "ABCD"[i], "category": kind, "l2_category": finer, "meta_info": "x",
        }
        for i, (kind, finer) in enumerate(kinds)
    ]  # fmt: skip


def mmstar(folder):
    parquet(folder / "mmstar.parquet", mmstar_rows())
    return ["A", "(B)", "It is C", "answer: D"], 2 / 4


def realworldqa(folder):
    note = "Please answer directly with only the letter of the correct option and nothing else."
    rows = [
        {"question": f"Which way?\n\nA. Left.\nB. Right.\n{note}", "answer": "B", "image": 1},
        {"question": "How many cars?\nPlease answer directly with a number.", "answer": "3", "image": 2},
        {"question": "Uphill or downhill?", "answer": "Downhill", "image": 3},
        {"question": f"Which?\n\nA. a\nB. b\n{note}", "answer": "A", "image": 4},
    ]
    parquet(folder / "data" / "test-00000-of-00002.parquet", rows[:2])
    parquet(folder / "data" / "test-00001-of-00002.parquet", rows[2:])
    return ["The answer is (B).", "3.", "uphill", ""], 2 / 4


def mmmu_rows(subject, split="validation"):
    images = {f"image_{k}": None for k in range(2, 8)}
    base = {"explanation": "", "img_type": "['Plots']", "topic_difficulty": "Easy", "subfield": "x"}
    return [
        base | images | {
            "id": f"{split}_{subject}_1", "question": f"{subject}: what is in <image 1>?", "image_1": 10,
            "options": "['cat', \"dog's\"]", "answer": "B", "question_type": "multiple-choice",
        },
        base | images | {
            "id": f"{split}_{subject}_2", "question": f"{subject}: <image 1> or <image 2>?", "image_1": 20,
            "image_2": 30, "options": "['<image 3>', 'none']", "image_3": 40, "answer": "A",
            "question_type": "multiple-choice",
        },
        base | images | {
            "id": f"{split}_{subject}_3", "question": f"{subject}: how many? <image 1>", "image_1": 50,
            "options": "[]", "answer": "1,200.5", "question_type": "open",
        },
    ]  # fmt: skip


def mmmu(folder):
    """A configuration per subject, as in MMMU/MMMU."""
    for subject in ("Math", "Art_Theory"):
        parquet(folder / subject / "validation-00000-of-00001.parquet", mmmu_rows(subject))
        parquet(folder / subject / "dev-00000-of-00001.parquet", mmmu_rows(subject, "dev"))
    return ["B", "I do not know", "The total is 1200.5", "(A) no, (B)", "A", "about 7"], None


def chartqa(folder):
    """The release: two JSON files and a folder of images."""
    top = folder / "ChartQA Dataset" / "test"
    (top / "png").mkdir(parents=True)
    (top / "png" / "1.png").write_bytes(jpeg(1))
    for kind, answers in (("human", ["10", "Yes"]), ("augmented", ["2019", "5%"])):
        rows = [{"imgname": "1.png", "query": f"{kind} {i}?", "label": a} for i, a in enumerate(answers)]
        (top / f"test_{kind}.json").write_text(json.dumps(rows))
    return ["10.5", "no", "2000", "0.0531"], 2 / 4


def ocrbench(folder):
    """The release: a JSON file and a folder of images."""
    rows = [
        ("IIIT5K", "CENTRE", "Regular Text Recognition"), ("docVQA", ["no", "none"], "Doc-oriented VQA"),
        ("HME100k", "x ^ 2", "Handwritten Mathematical Expression Recognition"),
        ("SROIE", "$5.00", "Key Information Extraction"),
    ]  # fmt: skip
    rows = [
        {
            "dataset_name": d,
            "id": i,
            "image_path": f"{d}/{i}.jpg",
            "question": f"{d}?",
            "answers": a,
            "type": t,
        }
        for i, (d, a, t) in enumerate(rows)
    ]
    (folder / "OCRBench").mkdir(parents=True)
    (folder / "OCRBench" / "OCRBench.json").write_text(json.dumps(rows))
    for i, row in enumerate(rows):
        path = folder / "OCRBench_Images" / row["image_path"]
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(i))
    return ["It says centre.", "None at all", "x^2", "5"], 3 / 4


def mmstar_table(folder):
    """VLMEvalKit's table: options in columns, and images as base64 text."""
    names = ("index", "question", "A", "B", "C", "D", "answer", "category", "l2_category", "image")
    lines = ["\t".join(names)]
    for row in mmstar_rows():
        image = base64.b64encode(jpeg(row["image"])).decode()
        cells = (row["index"], f"Which {row['index']}?", "one", "two", "three", "four", row["answer"])
        lines.append("\t".join(map(str, (*cells, row["category"], row["l2_category"], image))))
    folder.mkdir(parents=True)
    (folder / "MMStar.tsv").write_text("\n".join(lines) + "\n")


HUB_BUILDERS = {f.__name__: f for f in (ai2d, mmstar, realworldqa, mmmu, chartqa, ocrbench)}
