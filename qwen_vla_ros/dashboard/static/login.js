// Asks for the token until it is right. The token itself is not kept: the server gives a cookie for it.

import { $, say, show } from "/static/dom.js";
import { post } from "/static/link.js";

export function askToken() {
  const form = $("#login");
  show(form, true);
  document.body.classList.add("locked");
  $("#token").focus();
  return new Promise((resolve) => {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      say($("#login-problem"), "");
      const answer = await post("/login", { token: $("#token").value });
      if (answer.ok) {
        $("#token").value = "";
        show(form, false);
        document.body.classList.remove("locked");
        resolve();
      } else {
        say($("#login-problem"), answer.message);
        $("#token").select();
      }
    });
  });
}
