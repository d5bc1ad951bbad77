// The page's own elements. Text from outside is only ever set as textContent.

function emptyFigure() {
  const figure = document.createElement("figure")
  const frame = document.createElement("div")
  const image = document.createElement("img")
  frame.className = "frame"
  image.draggable = false
  frame.append(image)
  figure.append(frame, document.createElement("figcaption"))
  return figure
}

function fill(figure, { title, source, alt }) {
  const image = figure.querySelector("img")
  image.src = source
  image.alt = alt
  figure.querySelector("figcaption").textContent = title
}

// Pictures side by side; a click on one sets the point (row, column) that is marked on all.
function gallery(model) {
  const root = document.createElement("div")
  root.className = "pictures"
  const scale = document.createElement("div")
  scale.className = "scale"

  function mark() {
    root.querySelectorAll(".cross").forEach((cross) => cross.remove())
    if (!model.clickable || model.point.length !== 2) return
    for (const frame of root.querySelectorAll(".frame")) {
      const cross = document.createElement("div")
      cross.className = "cross"
      cross.style.top = `${100 * model.point[0]}%`
      cross.style.left = `${100 * model.point[1]}%`
      frame.append(cross)
    }
  }
  function choose(event) {
    const box = event.currentTarget.getBoundingClientRect()
    const inside = (at, size) => Math.min(Math.max(at / size, 0), 1)
    model.point = [
      inside(event.clientY - box.top, box.height),
      inside(event.clientX - box.left, box.width),
    ]
  }
  function draw() {
    while (root.children.length > model.pictures.length) root.lastChild.remove()
    while (root.children.length < model.pictures.length) {
      const figure = emptyFigure() // kept from then on: a click while pictures change must find its element
      if (model.clickable) {
        figure.firstChild.classList.add("clickable")
        figure.firstChild.addEventListener("click", choose)
      }
      root.append(figure)
    }
    model.pictures.forEach((one, i) => fill(root.children[i], one))
    scale.replaceChildren()
    if (model.scale.length === 3) {
      const [low, source, high] = model.scale
      const bar = document.createElement("img")
      bar.src = source
      bar.alt = "colours from low to high"
      scale.append(low, bar, high)
    }
    mark()
  }
  model.on("pictures", draw)
  model.on("scale", draw)
  model.on("point", mark)
  draw()
  const whole = document.createElement("div")
  whole.append(root, scale)
  return whole
}

// Two pictures on top of each other; the slider says where the left one ends.
function swipe(model) {
  const root = document.createElement("div")
  root.className = "swipe"
  const slider = document.createElement("input")
  slider.type = "range"
  slider.min = 0
  slider.max = 100
  slider.step = 1
  slider.setAttribute("aria-label", "Where the left picture ends and the right one begins")

  function cut() {
    slider.value = model.share
    const left = root.querySelector(".left")
    const line = root.querySelector(".line")
    if (left) left.style.clipPath = `inset(0 ${100 - model.share}% 0 0)`
    if (line) line.style.left = `${model.share}%`
  }
  function draw() {
    const stack = document.createElement("div")
    stack.className = "stack"
    const titles = document.createElement("div")
    titles.className = "titles"
    if (model.pictures.length === 2) {
      const [left, right] = model.pictures
      for (const [side, one] of [["right", right], ["left", left]]) {
        const image = document.createElement("img")
        image.src = one.source
        image.alt = one.alt
        image.className = side
        image.draggable = false
        stack.append(image)
      }
      const line = document.createElement("div")
      line.className = "line"
      stack.append(line)
      for (const one of [left, right]) {
        const title = document.createElement("span")
        title.textContent = one.title
        titles.append(title)
      }
    }
    root.replaceChildren(titles, stack, slider)
    cut()
  }
  slider.addEventListener("input", () => { model.share = Number(slider.value) })
  model.on("pictures", draw)
  model.on("share", cut)
  draw()
  return root
}

// A file from the visitor's disk. One that is too large is refused here, before it is sent.
function upload(model) {
  const label = document.createElement("label")
  label.className = "upload"
  const input = document.createElement("input")
  input.type = "file"
  input.accept = model.accept
  const text = document.createElement("span")
  text.textContent = model.label
  input.addEventListener("change", async () => {
    const [file] = input.files
    if (!file) return
    const chosen = { name: file.name, size: file.size, data: "" }
    if (file.size <= model.most) {
      const url = await new Promise((resolve, reject) => {
        const reader = new FileReader()
        reader.onload = () => resolve(reader.result)
        reader.onerror = () => reject(reader.error)
        reader.readAsDataURL(file)
      })
      chosen.data = url.slice(url.indexOf(",") + 1)
    }
    model.send_msg(chosen)
    input.value = ""
  })
  label.append(text, input)
  return label
}

const ELEMENTS = { gallery, swipe, upload }

export function render({ model }) {
  return ELEMENTS[model.element](model)
}
