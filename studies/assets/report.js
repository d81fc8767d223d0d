(function () {
  "use strict";

  function all(selector, root) { return Array.from((root || document).querySelectorAll(selector)); }
  function show(element) { if (element) { element.hidden = false; } }
  function press(buttons, chosen) {
    buttons.forEach(function (button) { button.setAttribute("aria-pressed", String(button === chosen)); });
  }

  // Light and dark: the system's choice until the button is used; it is remembered where the browser allows it.
  function setUpTheme() {
    var root = document.documentElement, button = document.getElementById("theme");
    var system = window.matchMedia("(prefers-color-scheme: dark)");
    function dark() { return root.dataset.theme ? root.dataset.theme === "dark" : system.matches; }
    function name() { button.textContent = dark() ? "Light mode" : "Dark mode"; }
    try { if (localStorage.getItem("theme")) { root.dataset.theme = localStorage.getItem("theme"); } } catch (error) { }
    button.addEventListener("click", function () {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("theme", root.dataset.theme); } catch (error) { }
      name();
    });
    system.addEventListener("change", name);
    name();
    show(button);
  }

  // A method's button hides what carries its number: curves, dots, columns, pictures.
  function setUpMethods() {
    all("[data-method]").forEach(function (button) {
      button.addEventListener("click", function () {
        var on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        all('[data-m="' + button.dataset.method + '"]').forEach(function (element) {
          element.toggleAttribute("data-off", !on);
        });
      });
    });
  }

  // Tables

  function cellValue(cell, figures) {
    var value = figures ? (cell.dataset[figures] !== undefined ? cell.dataset[figures] : cell.dataset.value)
      : cell.dataset.value;
    if (value === undefined || value === "") { return null; }
    return isNaN(Number(value)) ? value.toLowerCase() : Number(value);
  }

  function compare(a, b, sign) {  // what is missing comes last, whichever the direction
    if (a === null || b === null) { return (a === null) - (b === null); }
    if (typeof a === typeof b) { return sign * (a < b ? -1 : a > b ? 1 : 0); }
    return typeof a === "number" ? -1 : 1;
  }

  function setUpTable(box) {
    var table = box.querySelector("table"), body = table.tBodies[0];
    var heads = all("thead th", table), original = Array.from(body.rows);
    var filter = box.querySelector("input"), select = box.querySelector("select");
    var count = box.querySelector(".count");

    function sort(column, direction) {
      var rows = original.slice();
      heads.forEach(function (head, index) {
        if (index === column) { head.setAttribute("aria-sort", direction); } else { head.removeAttribute("aria-sort"); }
      });
      if (column >= 0) {
        rows.sort(function (a, b) {
          return compare(cellValue(a.cells[column], box.dataset.show), cellValue(b.cells[column], box.dataset.show),
            direction === "ascending" ? 1 : -1);
        });
      }
      rows.forEach(function (row) { body.appendChild(row); });
    }

    heads.forEach(function (head, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.textContent = "";
      head.appendChild(button);
      button.addEventListener("click", function () {
        var now = head.getAttribute("aria-sort");
        var first = column === 0 ? "ascending" : "descending";
        var other = column === 0 ? "descending" : "ascending";
        if (!now) { sort(column, first); } else if (now === first) { sort(column, other); } else { sort(-1, ""); }
      });
    });
    if (select) {
      select.addEventListener("change", function () {
        var column = select.value === "" ? -1 : Number(select.value);
        sort(column, column === 0 ? "ascending" : "descending");
      });
    }
    if (filter) {
      filter.addEventListener("input", function () {
        var wanted = filter.value.trim().toLowerCase(), shown = 0;
        original.forEach(function (row) {
          row.hidden = row.textContent.toLowerCase().indexOf(wanted) < 0;
          shown += row.hidden ? 0 : 1;
        });
        count.textContent = wanted ? shown + " of " + original.length : "";
      });
    }
    all("[data-figures]", box).forEach(function (button, index, buttons) {
      button.addEventListener("click", function () {
        box.dataset.show = button.dataset.figures;
        press(buttons, button);
        var sorted = heads.findIndex(function (head) { return head.hasAttribute("aria-sort"); });
        if (sorted >= 0) { sort(sorted, heads[sorted].getAttribute("aria-sort")); }
      });
    });
    show(box.querySelector(".tools"));
    show(box.querySelector(".switch"));
  }

  // Pictures: one image at a time, all its tiles moved and enlarged together.

  function setUpViewer(viewer) {
    var shots = all(".shot", viewer), at = 0, zoom = 1, x = 0, y = 0;
    var status = viewer.querySelector(".status"), thumbs = viewer.querySelector(".thumbs");
    var views = all(".bar [data-show]", viewer), pointers = new Map(), pinch = 0;

    function goTo(index) {
      at = (index + shots.length) % shots.length;
      shots.forEach(function (shot, number) { shot.hidden = number !== at; });
      all("button", thumbs).forEach(function (button, number) {
        button.setAttribute("aria-current", String(number === at));
        if (number === at && thumbs.scrollWidth > thumbs.clientWidth) {
          thumbs.scrollLeft = button.parentNode.offsetLeft - thumbs.offsetLeft - thumbs.clientWidth / 2 + 42;
        }
      });
      status.textContent = "Image " + (at + 1) + " of " + shots.length;
      move(0, 0, 1);
    }

    function move(left, top, scale) {  // x and y are shares of a tile, so that all tiles show the same place
      zoom = Math.min(16, Math.max(1, scale));
      x = Math.min(0, Math.max(1 - zoom, left));
      y = Math.min(0, Math.max(1 - zoom, top));
      viewer.style.setProperty("--z", zoom);
      viewer.style.setProperty("--x", x);
      viewer.style.setProperty("--y", y);
      viewer.classList.toggle("zoomed", zoom > 1);
      viewer.querySelector(".zoom").textContent = Math.round(100 * zoom) + " %";
    }

    function zoomAt(factor, across, down) {  // keeps the place (across, down), shares of a tile, where it is
      var scale = Math.min(16, Math.max(1, zoom * factor));
      move(across - (across - x) * scale / zoom, down - (down - y) * scale / zoom, scale);
    }

    function place(stage, event) {
      var box = stage.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    }

    function look(button) {
      viewer.dataset.view = button.dataset.show;
      press(views, button);
    }

    shots.forEach(function (shot, index) {
      var photo = shot.querySelector(".photo");
      all(".tile:not(.plain) .layers", shot).forEach(function (layers) {  // the photo is in the file once per image
        var under = document.createElement("img");
        under.className = "under";
        under.alt = "";
        under.src = photo.src;
        layers.insertBefore(under, layers.firstChild);
      });
      all(".tile", shot).forEach(function (tile) {
        var button = document.createElement("button");
        button.type = "button";
        button.textContent = "⤢";
        button.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-label", "Enlarge " + tile.querySelector("b").textContent);
        button.addEventListener("click", function () {
          button.setAttribute("aria-pressed", String(tile.classList.toggle("big")));
        });
        tile.querySelector("figcaption").appendChild(button);
      });
      var item = document.createElement("li"), thumb = document.createElement("button");
      var picture = document.createElement("img");
      thumb.type = "button";
      picture.alt = "";
      picture.src = photo.src;
      thumb.appendChild(picture);
      thumb.appendChild(document.createTextNode(shot.dataset.short + " " + shot.dataset.gain));
      thumb.setAttribute("aria-label", "Image " + shot.dataset.id + ", " + shot.dataset.group + ", gain "
        + shot.dataset.gain + " points");
      thumb.addEventListener("click", function () { goTo(index); });
      item.appendChild(thumb);
      thumbs.appendChild(item);
    });

    all(".stage", viewer).forEach(function (stage) {
      stage.addEventListener("dblclick", function (event) {
        if (zoom > 1) { move(0, 0, 1); } else { zoomAt(3, place(stage, event)[0], place(stage, event)[1]); }
      });
      stage.addEventListener("wheel", function (event) {
        if (!event.ctrlKey) { return; }  // a plain wheel scrolls the page
        event.preventDefault();
        zoomAt(Math.exp(-event.deltaY / 200), place(stage, event)[0], place(stage, event)[1]);
      }, { passive: false });
      stage.addEventListener("pointerdown", function (event) {
        pointers.set(event.pointerId, event);
        pinch = 0;
        if (zoom > 1) { stage.setPointerCapture(event.pointerId); }
      });
      stage.addEventListener("pointermove", function (event) {
        var before = pointers.get(event.pointerId), box = stage.getBoundingClientRect();
        if (!before) { return; }
        pointers.set(event.pointerId, event);
        if (pointers.size === 1 && zoom > 1) {
          move(x + (event.clientX - before.clientX) / box.width, y + (event.clientY - before.clientY) / box.height, zoom);
        } else if (pointers.size === 2) {
          var two = Array.from(pointers.values());
          var apart = Math.hypot(two[0].clientX - two[1].clientX, two[0].clientY - two[1].clientY);
          var middle = place(stage, { clientX: (two[0].clientX + two[1].clientX) / 2,
            clientY: (two[0].clientY + two[1].clientY) / 2 });
          if (pinch > 0) { zoomAt(apart / pinch, middle[0], middle[1]); }
          pinch = apart;
        }
      });
      ["pointerup", "pointercancel", "pointerleave"].forEach(function (name) {
        stage.addEventListener(name, function (event) { pointers.delete(event.pointerId); pinch = 0; });
      });
    });

    viewer.addEventListener("keydown", function (event) {
      if (event.ctrlKey || event.metaKey || event.altKey) { return; }
      var step = 0.2, key = event.key, keys = {
        ArrowLeft: function () { if (event.shiftKey) { move(x + step, y, zoom); } else { goTo(at - 1); } },
        ArrowRight: function () { if (event.shiftKey) { move(x - step, y, zoom); } else { goTo(at + 1); } },
        ArrowUp: event.shiftKey ? function () { move(x, y + step, zoom); } : null,
        ArrowDown: event.shiftKey ? function () { move(x, y - step, zoom); } : null,
        Home: function () { goTo(0); },
        End: function () { goTo(shots.length - 1); },
        "+": function () { zoomAt(1.5, 0.5, 0.5); },
        "=": function () { zoomAt(1.5, 0.5, 0.5); },
        "-": function () { zoomAt(1 / 1.5, 0.5, 0.5); },
        "0": function () { move(0, 0, 1); },
        "1": function () { look(views[0]); },
        "2": function () { look(views[1]); },
        "3": function () { look(views[2]); }
      };
      if (Object.prototype.hasOwnProperty.call(keys, key) && keys[key]) { keys[key](); event.preventDefault(); }
    });

    viewer.querySelector(".before").addEventListener("click", function () { goTo(at - 1); });
    viewer.querySelector(".after").addEventListener("click", function () { goTo(at + 1); });
    viewer.querySelector(".in").addEventListener("click", function () { zoomAt(1.5, 0.5, 0.5); });
    viewer.querySelector(".out").addEventListener("click", function () { zoomAt(1 / 1.5, 0.5, 0.5); });
    viewer.querySelector(".reset").addEventListener("click", function () { move(0, 0, 1); });
    views.forEach(function (button) { button.addEventListener("click", function () { look(button); }); });
    all("[hidden]", viewer).forEach(show);
    viewer.tabIndex = 0;
    viewer.setAttribute("role", "group");
    viewer.setAttribute("aria-label", "Image browser; the arrow keys change the image");
    goTo(0);
  }

  setUpTheme();
  setUpMethods();
  all(".sortable").forEach(setUpTable);
  all(".viewer").forEach(function (viewer) { if (viewer.querySelector(".shot")) { setUpViewer(viewer); } });
})();
